"""The operator dies after every write of every life of a job: a new one brings it to the same end; nothing is made twice, nothing left."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.builders import Clock, raw_job
from tests.fake_kueue import QUEUE, FakeKueue
from tests.fakes import FakeCluster, FakeKubelet, drive, told

from finetune_api.status import Failure
from finetune_operator.times import rfc3339

FULL = Failure(stage="Train", reason="StorageFull", message="no space left", retryable=True)


@dataclass
class QueuedKubelet(FakeKubelet):
    """A kubelet, a scheduler that heeds gates, and Kueue."""

    kueue: FakeKueue = field(init=False)

    def __post_init__(self) -> None:
        self.kueue = FakeKueue(self.cluster, room=2)
        self.schedulable = self.kueue.schedulable

    def step(self) -> None:
        self.kueue.step()
        super().step()


async def _evicted(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    """The node of all pods is drained."""
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1, 2])
    await told(cluster)
    disrupted = [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]
    for pod in list(cluster.pods):
        kubelet.end(pod, 143, conditions=disrupted)
    await drive(cluster, kubelet)


async def _retried(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    kubelet.script = {1: FULL, 2: FULL}
    await drive(cluster, kubelet)
    assert (cluster.status.phase, cluster.status.attempt.failures) == ("Failed", 2)
    cluster.annotate(**{"finetune.dev/retry": "1"})
    await drive(cluster, kubelet)


async def _canceled_and_revived(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1])
    cluster.annotate(**{"finetune.dev/cancel": "true"})
    await drive(cluster, kubelet)
    assert (cluster.status.phase, cluster.objects) == ("Failed", {})
    cluster.annotate(**{"finetune.dev/cancel": "", "finetune.dev/retry": "1"})
    await drive(cluster, kubelet)


async def _too_late(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1, 2])
    cluster.clock.advance(600)
    await drive(cluster, kubelet)
    assert cluster.status.condition("Failed").reason == "DeadlineExceeded"  # type: ignore[union-attr]


async def _expired(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    await drive(cluster, kubelet)
    assert cluster.job is None


async def _deleted(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    """Somebody's finalizer holds the job up while its pods go."""
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1])
    assert cluster.job is not None
    cluster.job["metadata"]["deletionTimestamp"] = rfc3339(cluster.clock.now)
    await drive(cluster, kubelet)
    for _ in range(4):  # nothing wakes the operator but the pods
        kubelet.step()
        await drive(cluster, kubelet)
    assert cluster.pods == []
    cluster.job = None
    cluster.collect_garbage()


async def _paused(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1])
    cluster.annotate(**{"finetune.dev/reconcile": "disabled"})
    await drive(cluster, kubelet)
    cluster.annotate(**{"finetune.dev/reconcile": ""})
    await drive(cluster, kubelet)


async def _queued_and_preempted(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    assert isinstance(kubelet, QueuedKubelet)
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1, 2])
    kubelet.kueue.preempt()
    await drive(cluster, kubelet, until=lambda: cluster.status.phase == "Queued")
    kubelet.kueue.room = 2
    await drive(cluster, kubelet)
    assert kubelet.kueue.used == ["bot-1-1", "bot-2-1"]


Live = Callable[[FakeCluster, FakeKubelet], Awaitable[None]]
LIVES: dict[str, tuple[Live, dict[str, Any], str | None, list[str]]] = {
    "preempted": (_evicted, {}, "Complete", ["bot-2-head"]),
    "failed and retried": (_retried, {"backoffLimit": 1}, "Complete", ["bot-3-head"]),
    "canceled and revived": (_canceled_and_revived, {}, "Complete", ["bot-2-head"]),
    "deadline": (_too_late, {"activeDeadlineSeconds": 300}, "Failed", []),
    "time to live": (_expired, {"ttlSecondsAfterFinished": 60}, None, []),
    "deleted": (_deleted, {}, None, []),
    "paused": (_paused, {}, "Complete", ["bot-1-head"]),
    "queued and preempted": (_queued_and_preempted, {"labels": {QUEUE: "gpu"}}, "Complete", ["bot-2-head"]),
}
"""Each with the job, the phase at its end and the pods that are left; success, suspension, failure, a lost head are in test_reconcile."""


def world(spec: dict[str, Any]) -> tuple[FakeCluster, FakeKubelet]:
    cluster = FakeCluster(Clock(), raw_job(**spec))
    return cluster, QueuedKubelet(cluster) if "labels" in spec else FakeKubelet(cluster)


def end(cluster: FakeCluster) -> dict[str, Any] | None:
    """What a user sees at the end, without the times."""
    if cluster.job is None:
        return None
    status = cluster.status
    counts = (status.attempt.number, status.attempt.failures, status.attempt.preemptions, status.attempt.gangs)
    facts = {condition.type: (condition.status, condition.reason) for condition in status.conditions}
    return {"phase": status.phase, "attempt": counts, "facts": facts, "usage": status.usage and status.usage.trained_tokens}


@pytest.mark.parametrize(("live", "spec", "phase", "left"), LIVES.values(), ids=LIVES)
async def test_a_crash_after_any_write_of_any_life_does_no_harm(live, spec, phase, left) -> None:
    undisturbed, calm = world(spec)
    await live(undisturbed, calm)
    assert [name for _, name in undisturbed.objects] == left
    assert (undisturbed.status.phase if undisturbed.job else None) == phase
    points = len(undisturbed.writes)
    assert points > 10
    for number in range(1, points + 1):
        cluster, kubelet = world(spec)
        cluster.crash_after = number
        await live(cluster, kubelet)
        assert cluster.crash_after is None, "the operator did not come as far as this write"
        assert end(cluster) == end(undisturbed), f"after a crash at write {number} of {points}: {cluster.writes[number - 1]}"
        assert list(cluster.objects) == list(undisturbed.objects)
        assert sorted(set(cluster.made)) == sorted(cluster.made), f"made twice after a crash at write {number}"
        assert kubelet.trained == calm.trained


@pytest.mark.parametrize("number", range(1, 7))
async def test_what_went_with_a_deleted_config_map_is_made_anew_wherever_the_operator_dies(number: int) -> None:
    """The head is there and tells no longer that the other objects are: a dead operator's successor must know that they may be missing."""
    cluster, kubelet = world({})
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1])
    before = {key for key in cluster.objects if key[0] != "Pod"}
    del cluster.objects["ConfigMap", "bot-1"]
    cluster.collect_garbage()
    assert {kind for kind, _ in cluster.objects} == {"Pod"}
    cluster.crash_after = len(cluster.writes) + number
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1, 2, 3])
    assert cluster.crash_after is None
    assert {key for key in cluster.objects if key[0] != "Pod"} == before
    assert cluster.objects["ConfigMap", "bot-1"]["metadata"]["annotations"] == {"finetune.dev/objects": "owned"}
    await drive(cluster, kubelet)
    assert (cluster.status.phase, cluster.status.attempt.number, list(cluster.objects)) == ("Complete", 1, [("Pod", "bot-1-head")])
