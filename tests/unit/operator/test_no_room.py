"""A job that its user has made so large that no status fits into it any more: its limits hold nevertheless."""

import json
from dataclasses import dataclass
from typing import Any

from tests.builders import SETTINGS, Clock, raw_job
from tests.fakes import KEY, FakeCluster, FakeKubelet, drive

from finetune_api.status import DataSummary, Status
from finetune_operator.port import TooLarge
from finetune_operator.reconcile import TOO_LARGE_SECONDS, reconcile


@dataclass
class SmallCluster(FakeCluster):
    """Keeps no object beyond a size."""

    limit: int = 10**9

    def size(self, status: Any) -> int:
        assert self.job is not None
        return len(json.dumps({**self.job, "status": status}))

    async def patch_status(self, job: dict[str, Any], status: Status) -> dict[str, Any]:
        if self.size(status.to_json()) > self.limit:
            raise TooLarge("etcdserver: request is too large")
        return await super().patch_status(job, status)


async def training(**spec: Any) -> tuple[SmallCluster, FakeKubelet]:
    cluster = SmallCluster(Clock(), raw_job(**spec))
    kubelet = FakeKubelet(cluster, total_steps=10**6)
    await drive(cluster, kubelet, until=lambda: kubelet.trained[-1:] == [2])
    return cluster, kubelet


async def test_what_the_head_tells_at_length_gives_way_to_what_must_be_said() -> None:
    cluster, _ = await training(activeDeadlineSeconds=3600)
    cluster.limit = cluster.size(cluster.status.to_json()) + 2000
    for uid, report in cluster.reports.items():
        cluster.reports[uid] = report.model_copy(update={"data": DataSummary(train=1, made_samples=("x" * 1000,) * 3)})
    cluster.clock.advance(10)
    assert await reconcile(KEY, cluster, SETTINGS, cluster.clock.now) == SETTINGS.poll_seconds
    assert (cluster.status.phase, cluster.status.data, len(cluster.pods)) == ("Training", None, 3)
    cluster.clock.advance(3600)
    await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
    assert (cluster.status.phase, cluster.status.data) == ("Failed", None)
    assert "deletionTimestamp" in cluster.objects["Pod", "bot-1-head"]["metadata"], "which has its workers save a checkpoint first"


async def test_where_nothing_fits_the_pods_go_until_something_does() -> None:
    cluster, kubelet = await training(activeDeadlineSeconds=3600)
    cluster.limit = cluster.size(cluster.status.to_json())
    cluster.clock.advance(3600)
    assert await reconcile(KEY, cluster, SETTINGS, cluster.clock.now) == TOO_LARGE_SECONDS
    assert (cluster.status.phase, [each for each in cluster.pods if "deletionTimestamp" not in each["metadata"]]) == ("Training", [])
    cluster.limit = 10**9
    await drive(cluster, kubelet)
    assert cluster.status.failure is not None
    assert (cluster.status.failure.reason, len(cluster.objects)) == ("DeadlineExceeded", 0)


async def test_a_pause_keeps_no_pods_of_a_job_without_room() -> None:
    cluster, _ = await training()
    cluster.limit = cluster.size(cluster.status.to_json())
    cluster.annotate(**{"finetune.dev/reconcile": "disabled"})
    assert await reconcile(KEY, cluster, SETTINGS, cluster.clock.now) == TOO_LARGE_SECONDS
    assert [each for each in cluster.pods if "deletionTimestamp" not in each["metadata"]] == []
