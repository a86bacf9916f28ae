"""Jobs that exist already: some train, the others are complete.

Two are lived through with the operator; the rest are made in their likeness.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.bench.reporting import Heads
from tests.integration.api.kube import Kube, Object
from tests.integration.api.players import NODE, Script, endless, next_address, success
from tests.integration.api.stages import Stage, is_true, job_manifest

NAMESPACES = tuple(f"bench-{number}" for number in range(10))
AT_ONCE = 8
"""Jobs that are being made at the same time."""
TEMPLATE = "template-of-jobs"
"""Name of the jobs that were lived through: a word that stands nowhere else in them."""


@dataclass(frozen=True)
class Likeness:
    """A job and what it owns, as the operator left them."""

    job: Object
    pods: tuple[Object, ...]
    config_maps: tuple[Object, ...]


@dataclass(frozen=True)
class Fleet:
    """The jobs, as namespace/name."""

    training: tuple[str, ...]
    complete: tuple[str, ...]

    @property
    def jobs(self) -> tuple[str, ...]:
        return (*self.training, *self.complete)


async def make_fleet(stage: Stage, heads: Heads, number: int, training: int) -> Fleet:
    """So many jobs, of which so many train, shared out over the namespaces."""
    trains = await _lived(stage, endless, lambda job: (job.get("status", {}).get("progress") or {}).get("step") == 5)
    complete = await _lived(stage, success, lambda job: is_true(job, "Complete"))
    for namespace in NAMESPACES:
        await stage.kube.create("Namespace", {"metadata": {"name": namespace}})
    async with asyncio.timeout(60):
        while not all([await stage.kube.get("ServiceAccount", namespace, "default") for namespace in NAMESPACES]):
            await asyncio.sleep(0.2)
    names = [f"{NAMESPACES[index % len(NAMESPACES)]}/tune-{index}" for index in range(number)]
    gate, made = asyncio.Semaphore(AT_ONCE), 0

    async def make(index: int) -> None:
        nonlocal made
        async with gate:
            await _clone(stage.kube, trains if index < training else complete, names[index], heads)
        made += 1
        if made * 10 % number < 10:
            print(f"fleet: {made} of {number} jobs are made", flush=True)

    async with asyncio.TaskGroup() as group:
        for index in range(number):
            group.create_task(make(index))
    return Fleet(tuple(names[:training]), tuple(names[training:]))


async def _lived(stage: Stage, script: Script, there: Callable[[Object], bool]) -> Likeness:
    """Let one job live until it is there, take its likeness, and remove it."""
    kube, namespace = stage.kube, stage.namespace
    async with (
        stage.player(script).playing(),
        stage.operator(stage.server.admin_kubeconfig, FINETUNE_POLL_SECONDS="0.5").running() as operator,
    ):
        await operator.wait_until_ready()
        await kube.create("FineTuneJob", {**job_manifest(), "metadata": {"name": TEMPLATE}}, namespace)
        await stage.wait_for_job(there, "where its likeness is taken", operator)
        await _until_settled(stage)
    job = await kube.get("FineTuneJob", namespace, TEMPLATE)
    assert job is not None
    likeness = Likeness(job, tuple(await kube.list("Pod", namespace)), tuple(await _own(kube, namespace, job["metadata"]["uid"])))
    await kube.delete("FineTuneJob", namespace, TEMPLATE)
    for pod in likeness.pods:
        await kube.delete("Pod", namespace, pod["metadata"]["name"], grace=0)
    return likeness


async def _own(kube: Kube, namespace: str, uid: str) -> list[Object]:
    maps = await kube.list("ConfigMap", namespace)
    return [each for each in maps if any(owner["uid"] == uid for owner in each["metadata"].get("ownerReferences", ()))]


async def _until_settled(stage: Stage) -> None:
    """Wait until the job's objects stay as they are: what is to go has gone, and what runs is written in the status."""
    before: list[str] = []
    for _ in range(60):
        await asyncio.sleep(2)
        job = await stage.kube.get("FineTuneJob", stage.namespace, TEMPLATE)
        now = [*(await stage.children()), json.dumps((job or {}).get("status", {}).get("conditions"))]
        if now == before:
            return
        before = now
    raise AssertionError(f"the job that is taken as a likeness does not settle: {before}")


async def _clone(kube: Kube, likeness: Likeness, name: str, heads: Heads) -> None:
    namespace, own = name.split("/")
    old = likeness.job["metadata"]["uid"]
    made = await kube.create("FineTuneJob", _bare(likeness.job, "spec") | {"metadata": {"name": own}}, namespace)
    uid = made["metadata"]["uid"]

    def renamed(value: Any) -> Any:
        return json.loads(json.dumps(value).replace(TEMPLATE, own).replace(old, uid))

    for config_map in likeness.config_maps:
        await kube.create("ConfigMap", renamed(_bare(config_map, "data")), namespace)
    for pod in likeness.pods:
        body, address = renamed(_bare(pod, "spec")), next_address()
        body["spec"]["nodeName"] = NODE
        await kube.create("Pod", body, namespace)
        status = renamed(pod["status"]) | {"podIP": address, "podIPs": [{"ip": address}]}
        await kube.patch("Pod", namespace, body["metadata"]["name"], {"status": status}, "status")
        if body["metadata"]["name"].endswith("-head") and status["phase"] == "Running":
            await heads.add(uid, address)
    await kube.patch("FineTuneJob", namespace, own, {"status": renamed(likeness.job["status"])}, "status")


def _bare(made: Object, part: str) -> Object:
    """What somebody would have sent to have it made."""
    kept = {key: value for key, value in made["metadata"].items() if key in ("name", "labels", "annotations", "ownerReferences")}
    return {"metadata": kept, part: made[part], **{key: made[key] for key in ("apiVersion", "kind") if key in made}}
