"""A namespace, and what a test needs to let a job live in it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import yaml
from tests.integration.api.apiserver import ApiServer, free_port
from tests.integration.api.kube import CHILDREN, Kube, Object
from tests.integration.api.operators import UNSCHEDULABLE_CPU, Operator
from tests.integration.api.players import Player, Script, success

LIFE_SECONDS = 60
"""A played job's whole life takes a few seconds; this is when it is given up."""


class Stage:
    """Where one job lives."""

    def __init__(self, kube: Kube, server: ApiServer, namespace: str, folder: Path) -> None:
        self.kube, self.server, self.namespace, self.folder = kube, server, namespace, folder
        self.report_port = free_port()

    def player(self, script: Script = success) -> Player:
        return Player(self.kube, self.namespace, self.report_port, script)

    def operator(self, kubeconfig: Path | None = None, **settings: str) -> Operator:
        return Operator(self.folder, kubeconfig or self.server.operator_kubeconfig, self.namespace, self.report_port, **settings)

    async def apply(self, **spec: object) -> Object:
        """A small job, with other values of some fields."""
        return await self.kube.create("FineTuneJob", job_manifest(**spec), self.namespace)

    async def job(self) -> Object:
        job = await self.kube.get("FineTuneJob", self.namespace, "tune")
        assert job is not None, "the job is gone"
        return job

    async def wait_for_job(self, condition: Callable[[Object], bool], what: str, *operators: Operator) -> Object:
        """Wait until the job is as asked. Fails at once where an operator has ended, and in the end with the job's status and the log."""
        job: Object = {}
        try:
            async with asyncio.timeout(LIFE_SECONDS):
                async for kind, job in self.kube.watch("FineTuneJob", self.namespace):
                    if kind != "DELETED" and condition(job):
                        return job
        except TimeoutError:
            pass
        logs = "\n".join(operator.log_tail() for operator in operators)
        raise AssertionError(f"not {what} after {LIFE_SECONDS} s: {yaml.safe_dump(job.get('status'))}\n{logs}")

    async def wait_for_end(self, *operators: Operator) -> Object:
        """Wait until the job has ended, one way or the other."""
        return await self.wait_for_job(lambda job: is_true(job, "Complete") or is_true(job, "Failed"), "ended", *operators)

    async def told(self) -> list[str]:
        """Reasons of the Events about the job, one for each Event."""
        events = await self.kube.list("Event", self.namespace)
        return [event["reason"] for event in events if event["involvedObject"]["kind"] == "FineTuneJob"]

    async def children(self) -> list[str]:
        """What exists in the namespace that an operator can have made, as kind/name.

        What belongs to a ConfigMap that is gone counts as gone: a controller manager would collect it, and there may be none here.
        """
        found = {kind: [child["metadata"] for child in await self.kube.list(kind, self.namespace)] for kind in CHILDREN}
        there = {meta["uid"] for meta in found["ConfigMap"]}

        def lasts(owner: Object) -> bool:
            return owner["kind"] == "FineTuneJob" or (owner["kind"] == "ConfigMap" and owner["uid"] in there)

        own = ((kind, meta) for kind in CHILDREN for meta in found[kind] if any(map(lasts, meta.get("ownerReferences", ()))))
        return sorted(f"{kind}/{meta['name']}" for kind, meta in own)

    async def wait_for_children(self, *names: str) -> None:
        """Wait until exactly these are left."""
        left: list[str] = []
        try:
            async with asyncio.timeout(60):
                while (left := await self.children()) != sorted(names):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"left are {left}, not {sorted(names)}") from None


def is_true(job: Object, condition: str) -> bool:
    """Whether a condition holds."""
    return any(c["type"] == condition and c["status"] == "True" for c in job.get("status", {}).get("conditions", ()))


def job_manifest(**spec: object) -> Object:
    """The job `tune`: two workers, everything on volumes."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tune"},
        "spec": {
            "model": {"source": "pvc://models/base"},
            "data": {"train": {"source": "pvc://data/train.jsonl"}},
            "method": {"lora": {}},
            "compute": {"workers": {"min": 2, "max": 2}, "resourcesPerWorker": {"cpu": UNSCHEDULABLE_CPU}},
            "output": {"storage": "pvc://models/tuned"},
            **spec,
        },
    }


NewStage = Callable[[], Awaitable[Stage]]
