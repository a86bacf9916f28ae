"""One job's pods as processes of this machine: what the operator does, without the operator.

The head is started; when its report wants workers they are started, when it wants none they are stopped. Every process has the environment
that the pods have, and every process that was started is ended, whatever the test does.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from finetune_api.report import Report, parse_report
from finetune_trainer.environment import scratch_folder

REPOSITORY = Path(__file__).resolve().parents[3]
QUICKLY = "from finetune_trainer import crew, ray_cluster; ray_cluster.SETTLE_SECONDS = 3.0; crew.KEEP_SECONDS = 1.0; "
"""Elastic jobs wait for more workers, which here come at once or not at all."""
ROLE = "import runpy; runpy.run_module('finetune_trainer', run_name='__main__', alter_sys=True)"
PATIENCE = 900.0
"""Seconds after which a test gives up on what should have come long before."""


class Pods:
    """The pods of one job. A context: leaving it ends them."""

    def __init__(self, folder: Path, spec: dict[str, Any], *, uid: str = "", prelude: str = "", token: str = "") -> None:
        """`prelude` is Python that every process of theirs begins with."""
        self.folder, self._prelude = folder, prelude
        self.room = 1000
        """Workers for which there is room; others stay pending."""
        self.patience = PATIENCE
        """Seconds that `follow` takes at most."""
        self.uid = uid or secrets.token_hex(8)
        self.attempt = 0
        self.head: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        self.reports: list[Report] = []
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"name": "tuned", "namespace": "team", "uid": self.uid, "generation": 1}
        manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": spec}
        (folder / "job.json").write_text(json.dumps(manifest))
        self._token = token or secrets.token_hex(32)
        (folder / "token").write_text(self._token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            print(self.log())
        self.kill_head()
        self.stop_workers()
        for attempt in range(1, self.attempt + 1):
            shutil.rmtree(scratch_folder(self.uid, attempt), ignore_errors=True)

    def start_head(self) -> None:
        """Start the next attempt."""
        self.attempt += 1
        ray_port, self._report_port = free_ports(2)
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FINETUNE_"))},
            "PYTHONPATH": os.pathsep.join(str(REPOSITORY / name) for name in ("operator", "trainer", "")),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "FINETUNE_LOCAL": "1",
            "FINETUNE_JOB_FILE": str(self.folder / "job.json"),
            "FINETUNE_ATTEMPT": str(self.attempt),
            "FINETUNE_TOKEN_FILE": str(self.folder / "token"),
            "FINETUNE_HEAD_HOST": "127.0.0.1",
            "FINETUNE_RAY_PORT": str(ray_port),
            "FINETUNE_REPORT_PORT": str(self._report_port),
            "FINETUNE_VOLUMES": str(self.folder / "volumes"),
            "FINETUNE_TERMINATION_LOG": str(self.folder / f"termination-{self.attempt}"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "20",
        }
        self.head = self._start("head", "head")

    def follow(self, until: Callable[[Report], bool] = lambda _: False) -> Report | None:
        """Play the operator until the report is as asked, or the head has ended. Returns the report that was as asked."""
        assert self.head is not None
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            if self.head.poll() is not None:
                self.stop_workers()
                return None
            report = self.read_report()
            if report is None:
                time.sleep(0.1)
                continue
            self._scale(report.workers_wanted)
            if until(report):
                return report
            time.sleep(0.05)
        raise AssertionError(f"nothing came of it within {self.patience} s: {self.reports[-1:]}")

    def ended(self) -> tuple[int, Report]:
        """Follow the head to its end: its exit code and its last word."""
        assert self.head is not None
        self.follow()
        report = parse_report((self.folder / f"termination-{self.attempt}").read_text())
        assert report is not None
        return self.head.returncode, report

    def read_report(self, token: str | None = None) -> Report | None:
        """What the head says now, or None where it does not answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._report_port}/report", headers={"Authorization": f"Bearer {token or self._token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as response:  # noqa: S310
                report = parse_report(response.read())
        except OSError:
            return None
        if report is not None and (not self.reports or report.revision != self.reports[-1].revision):
            self.reports.append(report)
        return report

    def read(self, path: str) -> str:
        """A page of the head that needs no token."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._report_port}{path}", timeout=5) as response:
            return str(response.read().decode())

    def training_processes(self) -> list[int]:
        """The processes that run the loop."""
        pods = {worker.pid for worker in self.workers}
        return [
            pid
            for pid, words in command_lines().items()
            if words.startswith("ray::") and "TrainWorker" in words and pods & set(ancestors(pid))
        ]

    def kill_head(self) -> None:
        """kill -9 of the head and all that it started."""
        if self.head is not None and self.head.poll() is None:
            kill_tree(self.head.pid)
            self.head.wait()

    def terminate_head(self) -> None:
        """What the kubelet sends when the pod has to go."""
        assert self.head is not None
        self.head.send_signal(signal.SIGTERM)

    def terminate_worker(self) -> Report | None:
        """What the kubelet sends when a worker pod has to go; then it is made anew. Returns the report when it had gone."""
        gone = self.workers[-1]
        gone.send_signal(signal.SIGTERM)
        report = self.follow(lambda _: gone.poll() is not None)
        self.workers.remove(gone)
        return report

    def kill_worker(self) -> None:
        """kill -9 of the last worker pod and all in it."""
        gone = self.workers.pop()
        kill_tree(gone.pid)
        gone.wait()

    def stop_workers(self) -> None:
        """End the worker pods."""
        for worker in self.workers:
            if worker.poll() is None:
                kill_tree(worker.pid)
            worker.wait()
        self.workers = []

    def log(self) -> str:
        """Everything that the pods wrote."""
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}" for path in sorted(self.folder.glob("*.log")))

    def _scale(self, wanted: int) -> None:
        if wanted == 0:
            self.stop_workers()
        while len(self.workers) < min(wanted, self.room):
            self.workers.append(self._start("worker", f"worker-{len(self.workers)}"))

    def _start(self, role: str, name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{self.attempt}-{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", f"{QUICKLY}{self._prelude}{ROLE}", role],
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system gives away: Ray takes many of these before the head listens on its own."""
    found: list[int] = []
    while len(found) < count:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("", port))
            found += [] if port in found else [port]
    return found


def command_lines() -> dict[int, str]:
    """Every process of this machine and its command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return found


def ancestors(pid: int) -> list[int]:
    """The processes above one, the nearest first."""
    found: list[int] = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(pid)
    return found


def kill_tree(pid: int) -> None:
    """kill -9 of a process and all below it."""
    for process in [pid, *(other for other in command_lines() if pid in ancestors(other))]:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
