"""The port of the loop on this machine: pods become processes, claims folders, ConfigMaps and Secrets files."""

import asyncio
import base64
import contextlib
import logging
import os
import random
import re
import secrets
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

from finetune_api import LABEL_ATTEMPT, LABEL_JOB_NAME, LABEL_JOB_UID
from finetune_api.report import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SUCCEEDED, Report, parse_report
from finetune_api.status import Status
from finetune_operator.local import processes
from finetune_operator.local.pods import TERMINATION_LOG, ended_status, exit_code, gpus_wanted, launch, running_status
from finetune_operator.local.processes import EXIT_NOT_STARTED, Mark, Started
from finetune_operator.local.state import JobFile, State, read_json, remove, write_json
from finetune_operator.observed import Pod
from finetune_operator.plan import secret_name
from finetune_operator.port import Conflict, Event, JobKey, RawJob

REPORT_SECONDS = 3.0
TERMINATION_BYTES = 4096
_TAIL_BYTES = 2048

log = logging.getLogger(__name__)

Raw = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What this machine lends to a job's pods."""

    gpus: tuple[str, ...] = ()
    """Numbers or ids of the GPUs, as CUDA_VISIBLE_DEVICES names them."""
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    """Environment that the pods inherit: proxies, caches, the search path."""
    programs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Commands that take the place of a container's, by the container's name."""


class LocalCluster:
    """One job on this machine. Its pods live no longer than this object; what a killed run left is found by `end_left_overs`."""

    def __init__(self, state: State, job_file: JobFile, view: Callable[[Raw], Raw], machine: Machine) -> None:
        self.changed = asyncio.Event()
        """Set when a process has ended: a reason to look at once."""
        self._state = state
        self._job_file = job_file
        self._view = view
        self._machine = machine
        self._started: dict[str, Started] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ports: dict[tuple[str, str], int] = {}
        self._gpus: dict[str, tuple[str, ...]] = {}
        self._told: set[str] = set()
        self._broken: BaseException | None = None

    # The port.

    async def read(self, key: JobKey) -> RawJob | None:
        """The job, as this machine can run it, with its pods and ConfigMaps. Raises what went wrong while a pod was watched."""
        if self._broken is not None:
            raise self._broken
        job = self._job_file.load()
        if job is None or (job["metadata"]["namespace"], job["metadata"]["name"]) != tuple(key):
            return None
        uid = job["metadata"]["uid"]
        pods = [pod for pod in self._pods() if pod["metadata"]["labels"][LABEL_JOB_UID] == uid]
        maps = [config_map for config_map in self._state.config_maps() if config_map["metadata"]["labels"].get(LABEL_JOB_UID) == uid]
        return RawJob(job=self._view(job), pods=pods, config_maps=maps, events=[])

    async def fetch_report(self, pod: Pod, token: str, after: int, wait: float) -> Report | None:
        """What the head says; None where it does not answer."""
        port = self._ports.get((str(pod.attempt), "FINETUNE_REPORT_PORT"))
        if port is None:
            return None
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=wait + REPORT_SECONDS), trust_env=False) as session,
                session.get(
                    f"http://127.0.0.1:{port}/report",
                    params={"after": str(after), "wait": str(wait)},
                    headers={"Authorization": f"Bearer {token}"},
                ) as response,
            ):
                body = await response.read()
                return parse_report(body) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.debug("no report from %s: %r", pod.name, error)
            return None

    async def patch_status(self, job: Raw, status: Status) -> Raw:
        """Write the status beside the manifest. Raises Conflict where the job has changed since it was read."""
        stored = self._job_file.load()
        if stored is None or any(stored["metadata"][name] != job["metadata"][name] for name in ("uid", "resourceVersion")):
            raise Conflict(f"{job['metadata']['name']} has changed since it was read")
        return self._view(self._job_file.save({**stored, "status": status.to_json()}))

    async def apply(self, manifest: Raw) -> str:
        """Make the object; its name, in place of a UID. Services and NetworkPolicies have no meaning here."""
        kind, meta = manifest["kind"], manifest["metadata"]
        if kind == "Secret":
            self._state.write_keys(self._state.secret(meta["name"]), data_of(manifest))
        elif kind == "ConfigMap":
            self._state.write_keys(self._state.config_map(meta["name"]), data_of(manifest), meta)
        elif kind == "Pod" and not self._pod_file(meta["name"]).exists():
            await self._start(manifest)
        return str(meta["name"])

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str | None = None, grace: int | None = None) -> None:
        """Delete the object if it is there, and with a ConfigMap its Secret. A pod that does not end within its grace is killed."""
        if kind == "ConfigMap":
            self._forget(lambda meta: meta["name"] == name)
        elif kind == "Pod":
            self._delete_pod(name, uid, grace)

    async def delete_pods(self, namespace: str, labels: Mapping[str, str], *, grace: int | None = None) -> None:
        """Ask every pod with these labels to end."""
        for meta in (pod["metadata"] for pod in self._pods()):
            if labels.items() <= meta["labels"].items():
                self._delete_pod(meta["name"], None, grace)

    async def delete_job(self, job: Raw) -> None:
        """Forget the job. What it published stays."""
        for pod in self._pods():
            if pod["metadata"]["labels"][LABEL_JOB_UID] == job["metadata"]["uid"]:
                self._delete_pod(pod["metadata"]["name"], None, 0)
        self._job_file.remove()

    async def emit(self, job: Raw, event: Event) -> None:
        """Log the Event, once."""
        if event.name not in self._told:
            self._told.add(event.name)
            # The view tells the same from the status, so this is for those who turn the logging on.
            log.info("%s: %s: %s", job["metadata"]["name"], event.reason, event.message)

    # What only a run on this machine needs.

    def suspend(self) -> None:
        """Set spec.suspend, as a user would with kubectl patch."""
        job = self._job_file.load()
        if job is not None and not job["spec"].get("suspend"):
            meta = {**job["metadata"], "generation": job["metadata"].get("generation", 1) + 1}
            self._job_file.save({**job, "metadata": meta, "spec": {**job["spec"], "suspend": True}})
        self.changed.set()

    async def end_left_overs(self, job_name: str, grace: float) -> list[str]:
        """End what a killed run left of the job, with time to save a checkpoint. Returns the pods that were still running.

        A pod that ended while nobody looked keeps its outcome, if it left one.
        """
        pods = [pod for pod in self._pods() if pod["metadata"]["labels"][LABEL_JOB_NAME] == job_name and not _ended(pod)]
        marks = {pod["metadata"]["name"]: self._mark(pod["metadata"]["name"]) for pod in pods}
        running = {name: mark for name, mark in marks.items() if mark and processes.alive(mark)}
        heads_first = sorted(running, key=lambda name: "-worker-" in name)
        for name in heads_first:
            processes.terminate(running[name])
            # The head has the workers save a checkpoint, so it goes first; the workers have nothing to do without it.
            await processes.wait(running[name], grace if name == heads_first[0] else 5.0)
        for pod in pods:
            name = pod["metadata"]["name"]
            if mark := marks[name]:
                await processes.sweep(mark)
            message = self._termination_message(name)
            report = parse_report(message)
            if report and report.outcome and name not in running:
                code = {"Succeeded": EXIT_SUCCEEDED, "Failed": EXIT_FAILED, "Interrupted": EXIT_INTERRUPTED}[report.outcome]
                self._record_end(pod, code, message)
            else:
                self._remove_pod(name)
        return sorted(running)

    async def end_now(self) -> None:
        """Kill every process that this object started. Their pods are gone then, as if a node had died: no failure of the job."""
        for name in list(self._started):
            self._delete_pod(name, None, 0)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def forget_pods(self, job_name: str) -> None:
        """Remove what the ended pods of the job left, their logs, and the ConfigMaps and Secrets of its attempts."""
        for path in self._state.logs_of(job_name):
            path.unlink(missing_ok=True)
        for pod in self._pods():
            if pod["metadata"]["labels"][LABEL_JOB_NAME] == job_name:
                self._remove_pod(pod["metadata"]["name"])
        self._forget(lambda meta: meta["labels"].get(LABEL_JOB_NAME) == job_name)

    def _forget(self, which: Callable[[Raw], bool]) -> None:
        for meta in filter(which, [each["metadata"] for each in self._state.config_maps()]):
            remove(self._state.secret(_secret_beside(meta)))
            remove(self._state.config_map(meta["name"]))

    # Pods.

    async def _start(self, manifest: Raw) -> None:
        name = manifest["metadata"]["name"]
        folder = self._state.pod(name)
        folder.mkdir(parents=True, exist_ok=True)
        attempt = str(manifest["metadata"]["labels"][LABEL_ATTEMPT])
        pod = {**manifest, "metadata": {**manifest["metadata"], "uid": str(uuid.uuid4()), "creationTimestamp": _now()}}
        extra, mark = self._extra(manifest), processes.new_mark()
        write_json(folder / "process.json", {**mark.to_json(), "tmp": extra["TMPDIR"]})
        self._write_pod({**pod, "status": {"phase": "Pending"}})
        try:
            plan = launch(manifest, self._state, lambda port: self._port(attempt, port), self._machine.env, extra, self._machine.programs)
            for path in plan.folders:
                path.mkdir(parents=True, exist_ok=True)
            started = await processes.start(plan.command, plan.env, folder, self._state.log(name), mark)
        except (OSError, ValueError) as error:
            self._record_end(pod, EXIT_NOT_STARTED, f"cannot be started: {error}")
            return
        write_json(folder / "process.json", {**started.mark.to_json(), "tmp": extra["TMPDIR"]})
        self._write_pod({**pod, "status": running_status(pod["spec"]["containers"][0]["name"], _now())})
        self._started[name] = started
        self._spawn(self._watch(name, started))

    def _extra(self, manifest: Raw) -> dict[str, str]:
        """Variables that a process on this machine needs beside the manifest's."""
        name = manifest["metadata"]["name"]
        taken = {gpu for gpus in self._gpus.values() for gpu in gpus}
        self._gpus[name] = tuple(gpu for gpu in self._machine.gpus if gpu not in taken)[: gpus_wanted(manifest)]
        cache = Path(self._machine.env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return {
            "FINETUNE_LOCAL": "1",
            "FINETUNE_HEAD_HOST": "127.0.0.1",
            "FINETUNE_VOLUMES": str(self._state.root),
            "CUDA_VISIBLE_DEVICES": ",".join(self._gpus[name]),
            # A pod's home goes with the pod; models of the hub are worth keeping.
            "HF_HOME": self._machine.env.get("HF_HOME") or str(cache / "huggingface"),
            # Ray's sockets lie here, and the path of a socket may have 107 bytes: too few for a folder deep in someone's home.
            "TMPDIR": str(_make_tmp()),
        }

    def _delete_pod(self, name: str, uid: str | None, grace: int | None) -> None:
        pod = self._read_pod(name)
        if pod is None or (uid is not None and pod["metadata"]["uid"] != uid):
            return
        started = self._started.get(name)
        if started is None:
            self._remove_pod(name)
        elif "deletionTimestamp" not in pod["metadata"] or grace == 0:
            seconds = pod["spec"].get("terminationGracePeriodSeconds", 30) if grace is None else grace
            deletion = (datetime.now(UTC) + timedelta(seconds=seconds)).strftime(_TIME)
            self._write_pod({**pod, "metadata": {**pod["metadata"], "deletionTimestamp": deletion}})
            processes.terminate(started.mark)
            self._spawn(self._end(started, seconds))

    async def _watch(self, name: str, started: Started) -> None:
        """Wait for the end of a pod's first process; the rest of the pod ends with it, as in a container."""
        code = await started.process.wait()
        await processes.sweep(started.mark)
        self._started.pop(name, None)
        self._gpus.pop(name, None)
        pod = self._read_pod(name)
        if pod is not None:
            if "deletionTimestamp" in pod["metadata"]:
                self._remove_pod(name)
            else:
                self._record_end(pod, exit_code(code), self._termination_message(name) or (self.log_tail(name) if code else ""))
        self.changed.set()

    async def _end(self, started: Started, seconds: float) -> None:
        try:
            await asyncio.wait_for(asyncio.shield(started.process.wait()), seconds)
        except TimeoutError:
            await processes.sweep(started.mark)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broken = error
            self.changed.set()

    def _record_end(self, pod: Raw, code: int, message: str) -> None:
        self._write_pod({**pod, "status": ended_status(pod["spec"]["containers"][0]["name"], code, message, _now())})
        self._remove_tmp(pod["metadata"]["name"])

    def _remove_pod(self, name: str) -> None:
        self._remove_tmp(name)
        remove(self._state.pod(name))

    def _remove_tmp(self, name: str) -> None:
        tmp = str((read_json(self._state.pod(name) / "process.json") or {}).get("tmp", ""))
        # Only what was made for a pod is removed, whatever the file says.
        if _TMP_NAME.fullmatch(tmp):
            shutil.rmtree(tmp, ignore_errors=True)

    def _termination_message(self, name: str) -> str:
        try:
            return (self._state.pod(name) / TERMINATION_LOG).read_bytes()[:TERMINATION_BYTES].decode(errors="replace")
        except OSError:
            return ""

    def log_tail(self, name: str, size: int = _TAIL_BYTES) -> str:
        """The end of a pod's log: whole lines, at most `size` bytes."""
        try:
            with self._state.log(name).open("rb") as file:
                length = file.seek(0, os.SEEK_END)
                file.seek(max(0, length - size))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return text.partition("\n")[2] if length > size and "\n" in text else text

    def _port(self, attempt: str, name: str) -> int:
        """The port of this machine that stands for a port of an attempt's pods."""
        if (attempt, name) not in self._ports:
            self._ports[attempt, name] = _free_port(set(self._ports.values()))
        return self._ports[attempt, name]

    def _mark(self, name: str) -> Mark | None:
        return processes.mark_from(read_json(self._state.pod(name) / "process.json") or {})

    def _pod_file(self, name: str) -> Path:
        return self._state.pod(name) / "pod.json"

    def _read_pod(self, name: str) -> Raw | None:
        return read_json(self._pod_file(name))

    def _write_pod(self, pod: Raw) -> None:
        write_json(self._pod_file(pod["metadata"]["name"]), pod)

    def _pods(self) -> list[Raw]:
        found = (read_json(path) for path in sorted((self._state.root / "pods").glob("*/pod.json")))
        return [pod for pod in found if pod is not None]


_TIME = "%Y-%m-%dT%H:%M:%SZ"
_SHORT_TMP = "/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir()  # noqa: S108 - below it a folder is made for this user only
_TMP_NAME = re.compile(rf"{re.escape(_SHORT_TMP)}/ft[0-9a-f]{{6}}")
_RAYS_OWN_PORTS = {8265, 10001, 52365, *range(10002, 20000)}


def _secret_beside(meta: Raw) -> str:
    """Name of the Secret of the attempt whose ConfigMap has this metadata."""
    return secret_name(meta["labels"][LABEL_JOB_NAME], meta["ownerReferences"][0]["uid"], int(meta["labels"][LABEL_ATTEMPT]))


def data_of(manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """The keys of a ConfigMap or Secret. Raises ValueError where base64 is broken."""
    encoded = {**(manifest.get("binaryData") or {}), **((manifest.get("data") or {}) if manifest["kind"] == "Secret" else {})}
    plain = {**((manifest.get("data") or {}) if manifest["kind"] == "ConfigMap" else {}), **(manifest.get("stringData") or {})}
    keys = {key: base64.b64decode(value, validate=True) for key, value in encoded.items()}
    return {**keys, **{key: str(value).encode() for key, value in plain.items()}}


def _ended(pod: Raw) -> bool:
    return pod["status"]["phase"] in ("Succeeded", "Failed")


def _now() -> str:
    return datetime.now(UTC).strftime(_TIME)


def _make_tmp() -> Path:
    """A folder of a short name, for this user only. Raises OSError."""
    while True:
        with contextlib.suppress(FileExistsError):
            path = Path(_SHORT_TMP) / f"ft{secrets.token_hex(3)}"
            path.mkdir(mode=0o700)
            return path


def _free_port(taken: set[int]) -> int:
    """A port that nobody listens on now, and that Ray does not keep for its own processes. Raises OSError where there is none."""
    for _ in range(200):
        port = random.randint(20000, 32767)  # noqa: S311 - below the range that the system hands out to outgoing connections
        with socket.socket() as probe:
            if port in taken | _RAYS_OWN_PORTS:
                continue
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise OSError("no free port between 20000 and 32767")
