"""The operator as its users run it: a process of its own, told by its environment what to do."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from tests.integration.api.apiserver import free_port
from tests.integration.api.forks import Fork, Forks

ROOT = Path(__file__).parents[3]
KEY = "a key of the tests, of 32 bytes or so"
QUICK = {"FINETUNE_POLL_SECONDS": "0.5", "FINETUNE_RETRY_BASE_SECONDS": "0.1", "FINETUNE_LEADER_ELECTION": "false"}
UNSCHEDULABLE_CPU = "1000"
"""CPUs of every pod, so that a cluster that has a scheduler and nodes leaves the pods to be played."""


class Operator:
    """One replica, as a process."""

    def __init__(self, folder: Path, kubeconfig: Path, namespace: str, report_port: int, **settings: str) -> None:
        self.http_port = free_port()
        self.log = folder / f"operator-{self.http_port}.log"
        key = folder / "token.key"
        key.write_text(KEY)
        self._env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT / 'operator'}",
            "KUBECONFIG": str(kubeconfig),
            "FINETUNE_TOKEN_KEY_FILE": str(key),
            "FINETUNE_WATCH_NAMESPACES": namespace,
            "FINETUNE_OPERATOR_NAMESPACE": namespace,
            "FINETUNE_HTTP_PORT": str(self.http_port),
            "FINETUNE_REPORT_PORT": str(report_port),
            "FINETUNE_HEAD_CPU": UNSCHEDULABLE_CPU,
            **QUICK,
            **settings,
        }
        self.forks: Forks | None = None
        """Where to have the process forked; None starts it from nothing, as a user does."""
        self.module = "finetune_operator"
        """What is run: a benchmark runs it in another way, or something else beside it."""
        self.process: asyncio.subprocess.Process | Fork | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Operator"]:
        await self.start()
        try:
            yield self
        finally:
            await self.end(signal.SIGKILL)

    async def start(self) -> None:
        if self.forks:
            self.process = await self.forks.start(self._env, self.log)
            return
        with self.log.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self.module, env=self._env, cwd=ROOT, stdout=output, stderr=asyncio.subprocess.STDOUT
            )

    def kill(self) -> None:
        """SIGKILL, at once."""
        if self.process and self.process.returncode is None:
            self.process.kill()

    async def exited(self) -> int:
        """Wait for the process to end by itself, or by somebody else's hand."""
        assert self.process is not None
        return await self.process.wait()

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.process.wait()

    async def wait_until_ready(self) -> str:
        """Wait for /readyz to say yes; its words."""
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                status, text = await self.get("/readyz")
                if status == 200:
                    return text
            self.check_alive()
            await asyncio.sleep(0.1)

    async def get(self, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.http_port}{path}") as response:
            return response.status, await response.text()

    def check_alive(self) -> None:
        """Fail with the log's end where the process has ended by itself."""
        if self.process and self.process.returncode is not None:
            raise AssertionError(f"the operator ended with {self.process.returncode}:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines of the log, without their tracebacks' beginnings."""
        lines = self.log.read_text(errors="replace").splitlines()[-20:]
        return "\n".join(_brief(line) for line in lines)


def _brief(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return line[:500]
    return (
        f"{entry.get('timestamp')} {entry.get('level')} {entry.get('job', '')} {entry.get('message')} {entry.get('exception', '')[-300:]}"
    )
