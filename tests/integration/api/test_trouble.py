"""What users and clusters do wrong, as the status tells it."""

import asyncio
from typing import Any

import pytest
from tests.integration.api.kube import CHILDREN, Kube, Object
from tests.integration.api.players import endless, failed, success
from tests.integration.api.stages import Stage, is_true

pytestmark = [pytest.mark.api, pytest.mark.asyncio(loop_scope="session")]


def _ready(job: Object) -> Object:
    """The condition Ready, which tells in one place where the job stands."""
    return next((c for c in job.get("status", {}).get("conditions", ()) if c["type"] == "Ready"), {})


async def _kubelet_says(kube: Kube, pod: Object, reason: str, message: str) -> None:
    """An Event as the kubelet writes it about a pod."""
    meta = pod["metadata"]
    about = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"]}
    body = {"apiVersion": "v1", "kind": "Event", "type": "Warning", "reason": reason, "message": message, "involvedObject": about}
    body |= {
        "metadata": {"name": f"{meta['name']}.1"},
        "source": {"component": "kubelet"},
        "lastTimestamp": "2026-01-01T00:00:00Z",
        "count": 1,
    }
    await kube.create("Event", body, meta["namespace"])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('MountVolume.SetUp failed for volume "secret-s3" : secret "s3-key" not found', "SecretNotFound"),
        ('MountVolume.SetUp failed for volume "data" : configmap "questions" not found', "ConfigMapNotFound"),
    ],
)
async def test_missing_reference_is_named(stage: Stage, message: str, reason: str) -> None:
    async with stage.player().playing() as player, stage.operator().running() as operator:
        player.hold = lambda pod: True
        await stage.apply()
        await player.wait_for(lambda pods: "tune-1-head" in pods)
        await _kubelet_says(stage.kube, player.pods["tune-1-head"], "FailedMount", message)
        job = await stage.wait_for_job(lambda job: _ready(job).get("reason") == reason, reason, operator)
    assert message in _ready(job)["message"]
    assert len(player.created) == 1, "a worker was made before its head ran"


async def test_missing_claim_is_named(stage: Stage) -> None:
    words = 'persistentvolumeclaim "data" not found'
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    async with stage.player().playing() as player, stage.operator().running() as operator:
        player.hold = lambda pod: True
        await stage.apply()
        await player.wait_for(lambda pods: "tune-1-head" in pods)
        await stage.kube.patch("Pod", stage.namespace, "tune-1-head", {"status": {"conditions": [condition]}}, "status")
        job = await stage.wait_for_job(lambda job: _ready(job).get("reason") == "VolumeClaimNotFound", "VolumeClaimNotFound", operator)
    assert words in _ready(job)["message"]


async def test_policy_is_named_and_the_job_goes_on_when_it_is_lifted(stage: Stage) -> None:
    limits = {"limits": [{"type": "Container", "max": {"cpu": "10m"}}]}
    policy = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": limits}
    await stage.kube.create("LimitRange", policy, stage.namespace)
    async with stage.player().playing() as player, stage.operator().running() as operator:
        await stage.apply()
        job = await stage.wait_for_job(lambda job: _ready(job).get("reason") == "AdmissionDenied", "AdmissionDenied", operator)
        assert "maximum cpu usage per Container is 10m" in _ready(job)["message"]
        assert not player.created
        await stage.kube.delete("LimitRange", stage.namespace, "small")
        job = await stage.wait_for_end(operator)
    assert job["status"]["phase"] == "Complete"
    assert job["status"]["attempt"]["failures"] == 0, "what the cluster refuses is not the training's failure"


async def test_bad_data_fails_at_once_and_no_worker_is_made(stage: Stage) -> None:
    def bad(uid: str, attempt: int) -> list[Any]:
        return [success(uid, attempt)[0], failed(uid, attempt, "DatasetInvalid", retryable=False)]

    async with stage.player(bad).playing() as player, stage.operator().running() as operator:
        await stage.apply()
        job = await stage.wait_for_end(operator)
        await stage.wait_for_children("Pod/tune-1-head")
    assert is_true(job, "Failed")
    assert is_true(job, "Stalled")
    assert job["status"]["failure"]["reason"] == "DatasetInvalid"
    assert job["status"]["failure"]["hint"]
    assert [name for name, _ in player.created] == ["tune-1-head"]


async def test_users_edits_and_the_operators_patches_do_not_lose_each_other(stage: Stage) -> None:
    async with stage.player().playing(), stage.operator().running() as operator:
        await stage.apply()

        async def edit() -> int:
            for number in range(10_000):
                await stage.kube.patch("FineTuneJob", stage.namespace, "tune", {"metadata": {"labels": {"edited": str(number)}}})
                await asyncio.sleep(0.01)
            return 10_000

        editing = asyncio.create_task(edit())
        try:
            job = await stage.wait_for_end(operator)
        finally:
            editing.cancel()
    assert job["status"]["phase"] == "Complete"
    assert int(job["metadata"]["labels"]["edited"]) > 10


async def test_suspended_job_gives_everything_back_and_goes_on(stage: Stage) -> None:
    async with stage.player(endless).playing() as player, stage.operator().running() as operator:
        await stage.apply()
        await player.wait_for(lambda pods: len(pods) == 3)
        await stage.kube.patch("FineTuneJob", stage.namespace, "tune", {"spec": {"suspend": True}})
        await stage.wait_for_job(lambda job: is_true(job, "Suspended"), "suspended", operator)
        await stage.wait_for_children()
        player.script = success
        await stage.kube.patch("FineTuneJob", stage.namespace, "tune", {"spec": {"suspend": False}})
        job = await stage.wait_for_end(operator)
    assert job["status"]["phase"] == "Complete"
    assert job["status"]["attempt"]["number"] == 2
    assert job["status"]["attempt"]["failures"] == 0
    assert job["status"]["attempt"]["preemptions"] == 0


async def test_job_is_deleted_after_its_time_to_live(stage: Stage) -> None:
    async with stage.player().playing(), stage.operator().running():
        await stage.apply(ttlSecondsAfterFinished=0)
        async with asyncio.timeout(60):
            async for kind, _ in stage.kube.watch("FineTuneJob", stage.namespace):
                if kind == "DELETED":
                    break


async def test_job_of_a_deleted_name_starts_anew_and_takes_over_nothing(stage: Stage) -> None:
    async with stage.player(endless).playing() as player, stage.operator().running() as operator:
        first = await stage.apply()
        await player.wait_for(lambda pods: len(pods) == 3)
        player.script = success
        await stage.kube.delete("FineTuneJob", stage.namespace, "tune")
        second = await stage.apply()
        if not stage.server.collects_garbage:
            await _collect(stage, first["metadata"]["uid"])
        job = await stage.wait_for_end(operator)
    assert job["metadata"]["uid"] == second["metadata"]["uid"] != first["metadata"]["uid"]
    assert job["status"]["phase"] == "Complete"
    assert job["status"]["attempt"]["number"] == 1
    assert job["status"]["attempt"]["preemptions"] == 0
    assert sorted(name for name, _ in player.created) == sorted(["tune-1-head", "tune-1-worker-0", "tune-1-worker-1"] * 2)


async def _collect(stage: Stage, owner: str) -> None:
    """Delete what something that was deleted owned, and what that owned, as a controller manager would."""
    for kind in CHILDREN:
        for child in await stage.kube.list(kind, stage.namespace):
            if owner in [reference["uid"] for reference in child["metadata"].get("ownerReferences", ())]:
                await stage.kube.delete(kind, stage.namespace, child["metadata"]["name"])
                await _collect(stage, child["metadata"]["uid"])


async def test_service_of_a_user_is_neither_changed_nor_deleted(stage: Stage) -> None:
    ports = [{"port": 80, "protocol": "TCP"}]
    mine = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "tune-1"}, "spec": {"ports": ports}}
    before = await stage.kube.create("Service", mine, stage.namespace)
    async with stage.player().playing() as player, stage.operator().running() as operator:
        await stage.apply()
        job = await stage.wait_for_job(lambda job: _ready(job).get("reason") == "Forbidden", "Forbidden", operator)
        assert f"Service {stage.namespace}/tune-1" in _ready(job)["message"]
        await stage.kube.patch("FineTuneJob", stage.namespace, "tune", {"spec": {"suspend": True}})
        await stage.wait_for_job(lambda job: is_true(job, "Suspended"), "suspended", operator)
        await stage.wait_for_children()
        assert not player.created
    assert (await stage.kube.get("Service", stage.namespace, "tune-1") or {})["metadata"]["uid"] == before["metadata"]["uid"]
