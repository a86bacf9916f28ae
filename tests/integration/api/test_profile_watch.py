"""Profiles on a real API server: a job waits for its own, begins when it appears, and keeps it whatever becomes of it."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator

import pytest
from tests.integration.api.kube import Object
from tests.integration.api.stages import Stage, is_true

pytestmark = [pytest.mark.api, pytest.mark.asyncio(loop_scope="session")]


@contextlib.asynccontextmanager
async def a_name(stage: Stage) -> AsyncIterator[str]:
    """A name of a profile, which is gone afterwards: profiles are of the whole cluster."""
    name = f"small-{uuid.uuid4().hex[:8]}"
    try:
        yield name
    finally:
        await stage.kube.delete("TuningProfile", "", name)


def profile(name: str, **spec: object) -> Object:
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "TuningProfile", "metadata": {"name": name}, "spec": spec}


def ready_reason(job: Object) -> str | None:
    """Why the job is as it is."""
    conditions = job.get("status", {}).get("conditions", ())
    return next((condition["reason"] for condition in conditions if condition["type"] == "Ready"), None)


async def test_a_job_waits_for_its_profile_and_lives_under_it(stage: Stage) -> None:
    async with a_name(stage) as name, stage.player().playing() as player:
        player.hold = lambda pod: pod["metadata"]["name"].endswith("worker-1")
        async with stage.operator().running() as operator:
            await stage.apply(profileRef={"name": name}, output={})
            await stage.wait_for_job(lambda job: ready_reason(job) == "ProfileNotFound", "waiting for its profile", operator)
            assert await stage.children() == []
            await stage.kube.create("TuningProfile", profile(name, output={"storage": "pvc://tuned/{name}"}, head={"cpu": "100m"}))
            await player.wait_for(lambda pods: "tune-1-worker-1" in pods)
        await stage.kube.delete("TuningProfile", "", name)
        async with stage.operator().running() as operator:  # another process, which has never seen the profile
            await player.release()
            job = await stage.wait_for_end(operator)
    assert is_true(job, "Complete")
    assert job["status"]["resolved"]["profile"]["name"] == name
    assert job["status"]["resolved"]["profile"]["storage"] == "pvc://tuned/tune"
    assert [made for made, _ in player.created] == ["tune-1-head", "tune-1-worker-0", "tune-1-worker-1"]


async def test_a_job_beyond_its_profile_is_refused_before_any_pod(stage: Stage) -> None:
    async with a_name(stage) as name, stage.operator().running() as operator:
        await stage.kube.create("TuningProfile", profile(name, limits={"workers": 1}))
        await stage.apply(profileRef={"name": name})
        job = await stage.wait_for_end(operator)
        async with asyncio.timeout(20):
            while "ProfileViolated" not in await stage.told():
                await asyncio.sleep(0.1)
    assert job["status"]["failure"]["reason"] == "ProfileViolated"
    assert job["status"]["failure"]["message"].endswith(f"the profile {name} allows at most 1 (limits.workers)")
    assert await stage.children() == []


async def test_no_label_leads_out_of_the_profiles_queue(stage: Stage) -> None:
    """The server keeps the queue in the status, so that it holds where the profile has gone and the label is another one."""

    async def queue_of(pod: str) -> str | None:
        found = await stage.kube.get("Pod", stage.namespace, pod)
        assert found is not None
        queue: str | None = found["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
        return queue

    async with a_name(stage) as name, stage.player().playing() as player:
        player.hold = lambda pod: "-worker-" in pod["metadata"]["name"]
        async with stage.operator().running():
            await stage.kube.create("TuningProfile", profile(name, queue="gpu", allow={"queues": ["low"]}))
            await stage.apply(profileRef={"name": name})
            await player.wait_for(lambda pods: "tune-1-worker-1" in pods)
        assert [await queue_of(f"tune-1-{pod}") for pod in ("head", "worker-0", "worker-1")] == [None, "gpu", "gpu"]
        await stage.kube.delete("TuningProfile", "", name)
        await stage.kube.patch(
            "FineTuneJob",
            stage.namespace,
            "tune",
            {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "prod"}}, "spec": {"suspend": True}},
        )
        async with stage.operator().running() as operator:
            await stage.wait_for_job(lambda job: is_true(job, "Suspended"), "suspended", operator)
            await stage.kube.patch("FineTuneJob", stage.namespace, "tune", {"spec": {"suspend": False}})
            await player.wait_for(lambda pods: "tune-2-worker-1" in pods)
            assert [await queue_of(f"tune-2-worker-{index}") for index in (0, 1)] == ["gpu", "gpu"]
            await player.release()
            job = await stage.wait_for_end(operator)
    assert is_true(job, "Complete")
    kept = job["status"]["resolved"]["profile"]
    assert (kept["queue"], kept["allow"]["queues"]) == ("gpu", ["low"])
