"""Pods played by the test: it is the scheduler, the kubelet and the trainer of one namespace.

Each head pod gets an address of the loopback network, where a server plays the trainer: it serves the reports of a script and goes from
one to the next when the operator has read the one before and the pods are as the report asked. Nothing waits for a time to pass.
"""

import asyncio
import contextlib
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from tests.integration.api.kube import AnswerError, Kube, Object

from finetune_api import LABEL_ATTEMPT, LABEL_JOB_UID, LABEL_ROLE
from finetune_api.report import Report, termination_message
from finetune_api.status import STAGES, Artifact, CheckpointRef, Checkpoints, Failure, Metric, Progress, Stage

NODE = "played-by-the-tests"
NOW = "2026-01-01T00:00:00Z"
_addresses = (f"127.{a}.{b}.{c}" for a, b, c in itertools.product(range(10, 250), range(1, 250), range(1, 250)))


def next_address() -> str:
    """An address of the loopback network that no pod has had yet."""
    return next(_addresses)


Script = Callable[[str, int], list[Report]]
"""Reports of one attempt, from the job's UID and the attempt's number; the last one has the outcome."""


def success(uid: str, attempt: int) -> list[Report]:
    """All four stages with two workers, and an adapter at the end."""
    # A report is whole: a later one repeats what an earlier one said, so that one that nobody read is not missed.
    loss = (Metric(name="train/loss", value=1.5, step=5),)
    steps = [
        _report(uid, attempt, 1, "Prepare"),
        _report(uid, attempt, 2, "Train", workers_wanted=2),
        _report(uid, attempt, 3, "Train", workers_wanted=2, progress=_progress(5), metrics=loss),
        _report(uid, attempt, 4, "Evaluate", workers_wanted=2, progress=_progress(10), metrics=loss),
        _report(uid, attempt, 5, "Publish", progress=_progress(10), metrics=loss),
    ]
    adapter = Artifact(kind="adapter", uri="pvc://models/a/adapter", digest="sha256:" + "0" * 64, bytes=1)
    end = steps[-1].model_copy(
        update={"revision": 6, "outcome": "Succeeded", "artifacts": (adapter,), "stages": _stages("Publish", ended=True)}
    )
    return [*steps, end]


def failure_then_success(uid: str, attempt: int) -> list[Report]:
    """The first attempt runs out of GPU memory in its training; the second succeeds."""
    if attempt > 1:
        return success(uid, attempt)
    return [*success(uid, attempt)[:3], failed(uid, attempt, "GPUOutOfMemory", retryable=True)]


def failed(uid: str, attempt: int, reason: str, *, retryable: bool) -> Report:
    """The last report of an attempt that fails in Train."""
    why = Failure(stage="Train", reason=reason, message=f"{reason} in the test", retryable=retryable)
    checkpoints = Checkpoints(latest=CheckpointRef(step=5, uri="pvc://models/a/checkpoints/step-00000005"))
    return _report(uid, attempt, 9, "Train", outcome="Failed", failure=why, checkpoints=checkpoints)


def endless(uid: str, attempt: int) -> list[Report]:
    """A training that goes on for as long as the test does."""
    return success(uid, attempt)[:3]


def _report(uid: str, attempt: int, revision: int, stage: str, **more: Any) -> Report:
    return Report(job_uid=uid, attempt=attempt, revision=revision, message=f"played: {stage}", stages=_stages(stage), **more)


def _stages(current: str, ended: bool = False) -> tuple[Stage, ...]:
    index = [str(stage) for stage in STAGES].index(current)
    done = [Stage(name=stage, state="Succeeded", start_time=NOW, end_time=NOW) for stage in STAGES[: index + ended]]
    return (*done, *([] if ended else [Stage(name=STAGES[index], state="Running", start_time=NOW)]))


def _progress(step: int) -> Progress:
    return Progress(percent=10 * step, step=step, total_steps=10, epoch=step / 10)


@dataclass
class Head:
    """A trainer that is played: what it says now, and what it was asked."""

    address: str
    port: int
    script: list[Report]
    token: str | None = None
    """What the operator is expected to show; None takes any."""
    read: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the current report has been read."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    report: Report | None = None

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        app = web.Application()
        app.add_routes([web.get("/report", self._answer)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, self.address, self.port).start()
        try:
            yield
        finally:
            await runner.cleanup()

    def say(self, report: Report) -> None:
        self.report, changed = report, self.changed
        self.read, self.changed = asyncio.Event(), asyncio.Event()
        changed.set()

    async def _answer(self, request: web.Request) -> web.Response:
        if not request.headers.get("Authorization", "").startswith("Bearer "):
            return web.Response(status=401)
        after, wait = int(request.query.get("after", -1)), float(request.query.get("wait", 0))
        if self.report is None or self.report.revision <= after:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), wait)
        if self.report is None:
            return web.Response(status=503)
        self.read.set()
        return web.json_response(self.report.to_json())


class Player:
    """Plays every pod of a namespace, and remembers every pod that ever was."""

    def __init__(self, kube: Kube, namespace: str, port: int, script: Script = success) -> None:
        self.kube, self.namespace, self.port, self.script = kube, namespace, port, script
        self.pods: dict[str, Object] = {}
        """Pods that exist, by name."""
        self.created: list[tuple[str, str]] = []
        """Name and UID of each pod that ever was, in order."""
        self.hold: Callable[[Object], bool] = lambda pod: False
        """Pods that have a node and stay pending."""
        self._played: set[str] = set()
        self._heads: dict[str, asyncio.Task[None]] = {}
        self._moved = asyncio.Condition()
        self._seen: set[str] = set()
        # Of each job apart, so that a thousand of them do not all look at all pods at every change.
        self._pods_of: defaultdict[str, dict[str, Object]] = defaultdict(dict)
        self._moved_of: defaultdict[str, asyncio.Condition] = defaultdict(asyncio.Condition)

    @contextlib.asynccontextmanager
    async def playing(self) -> AsyncIterator["Player"]:
        task = asyncio.create_task(self._play())
        try:
            yield self
        finally:
            for each in (task, *self._heads.values()):
                each.cancel()
            await asyncio.gather(task, *self._heads.values(), return_exceptions=True)

    async def wait_for(self, condition: Callable[[dict[str, Object]], bool]) -> None:
        """Wait until the pods are as asked."""
        async with self._moved:
            await self._moved.wait_for(lambda: condition(self.pods))

    async def release(self) -> None:
        """Let the pods run that were held."""
        self.hold = lambda pod: False
        for pod in list(self.pods.values()):
            await self._kubelet(pod)

    async def lose(self, name: str) -> None:
        """The pod's node dies: the pod goes without a word."""
        self._end_head(self.pods[name]["metadata"]["uid"])
        await self.kube.delete("Pod", self.namespace, name, grace=0)

    async def _play(self) -> None:
        async for kind, pod in self.kube.watch("Pod", self.namespace):
            name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
            job = pod["metadata"]["labels"][LABEL_JOB_UID]
            if kind == "DELETED":
                self.pods.pop(name, None)
                self._pods_of[job].pop(name, None)
                self._end_head(uid)
            else:
                self.pods[name] = self._pods_of[job][name] = pod
                if uid not in self._seen:
                    self._seen.add(uid)
                    self.created.append((name, uid))
                await self._kubelet(pod)
            for moved in (self._moved, self._moved_of[job]):
                async with moved:
                    moved.notify_all()

    async def _kubelet(self, pod: Object) -> None:
        meta, name = pod["metadata"], pod["metadata"]["name"]
        with contextlib.suppress(AnswerError):  # the pod may go at any time
            if meta.get("deletionTimestamp"):
                self._end_head(meta["uid"])
                await self.kube.delete("Pod", self.namespace, name, grace=0, uid=meta["uid"])
            elif meta["uid"] not in self._played:
                if not pod["spec"].get("nodeName"):
                    target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
                    await self.kube.create("Pod", {"metadata": {"name": name}, "target": target}, self.namespace, name, "binding")
                if self.hold(pod):
                    return
                self._played.add(meta["uid"])
                address = next_address()
                if meta["labels"][LABEL_ROLE] == "head":
                    self._heads[meta["uid"]] = asyncio.create_task(self._trainer(pod, address))
                await self._status(pod, "Running", address, {"running": {"startedAt": NOW}})

    async def _trainer(self, pod: Object, address: str) -> None:
        labels = pod["metadata"]["labels"]
        attempt, uid = int(labels[LABEL_ATTEMPT]), labels[LABEL_JOB_UID]
        head = Head(address, self.port, self.script(uid, attempt))
        async with head.serving():
            for report in head.script:
                if report.outcome:
                    break
                head.say(report)
                await head.read.wait()
                async with self._moved_of[uid]:
                    wanted = report.workers_wanted
                    await self._moved_of[uid].wait_for(lambda wanted=wanted: self._running_workers(attempt, uid) == wanted)  # type: ignore[misc]
            else:
                await asyncio.Event().wait()  # an endless training
            with contextlib.suppress(AnswerError):
                message = termination_message(report)
                ended = {"exitCode": 0 if report.outcome == "Succeeded" else 1, "reason": "Completed", "message": message}
                phase = "Succeeded" if report.outcome == "Succeeded" else "Failed"
                await self._status(pod, phase, address, {"terminated": {**ended, "startedAt": NOW, "finishedAt": NOW}})

    def _running_workers(self, attempt: int, uid: str) -> int:
        """Worker pods of an attempt: all of them must run to be counted, so that a pod on its way out counts too."""
        workers = [
            pod
            for pod in self._pods_of[uid].values()
            if pod["metadata"]["labels"][LABEL_ROLE] == "worker" and pod["metadata"]["labels"][LABEL_ATTEMPT] == str(attempt)
        ]
        return len(workers) if all(pod["status"].get("phase") == "Running" for pod in workers) else -1

    async def _status(self, pod: Object, phase: str, address: str, state: Object) -> None:
        name = pod["spec"]["containers"][0]["name"]
        container = {"name": name, "state": state, "ready": phase == "Running", "restartCount": 0, "image": "played", "imageID": "played"}
        conditions = [{"type": kind, "status": "True" if phase == "Running" else "False"} for kind in ("Ready", "ContainersReady")]
        conditions.append({"type": "PodScheduled", "status": "True"})
        status = {"phase": phase, "podIP": address, "podIPs": [{"ip": address}], "conditions": conditions, "containerStatuses": [container]}
        await self.kube.patch("Pod", self.namespace, pod["metadata"]["name"], {"status": status}, "status")

    def _end_head(self, uid: str) -> None:
        task = self._heads.pop(uid, None)
        if task:
            task.cancel()
