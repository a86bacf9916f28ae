"""A user may have his job left alone, but not keep GPUs by that for longer than his profile grants."""

import pytest
from tests.builders import SETTINGS, Clock, at, make_pod, raw_job
from tests.fakes import KEY, FakeCluster, FakeKubelet, drive
from tests.unit.operator.looks import step
from tests.unit.operator.profile_cases import raw_profile
from tests.unit.operator.test_monitoring import DAY, HOUR, SPEC, begun
from tests.unit.operator.test_requests import RECONCILE

from finetune_api.resolved_profile import ResolvedProfile
from finetune_api.status import Resolved
from finetune_operator.reconcile import reconcile

NAMED = {"profileRef": {"name": "small"}}
GPU = {"resourcesPerWorker": {"nvidia.com/gpu": 1}, "workers": {"min": 2, "max": 2}}


async def paused(limits: dict[str, float] | None, **spec: object) -> FakeCluster:
    """A job of two GPUs, under a profile with these limits (or none), that trains and is left alone."""
    profile = raw_profile(**({"limits": limits} if limits else {}))
    cluster = FakeCluster(Clock(), raw_job(compute=GPU, **{**NAMED, **spec}), profiles=[profile])
    kubelet = FakeKubelet(cluster, total_steps=10**6)
    await drive(cluster, kubelet, until=lambda: kubelet.trained[-1:] == [2])
    cluster.annotate(**{RECONCILE: "disabled"})
    return cluster


async def pass_time(cluster: FakeCluster, seconds: float) -> None:
    """The operator looks when it has said that it would, and every ten minutes; the pods go when they are told to."""
    end = cluster.clock.now.timestamp() + seconds
    while cluster.clock.now.timestamp() < end:
        delay = await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
        for pod in [pod for pod in cluster.pods if "deletionTimestamp" in pod["metadata"]]:
            cluster.objects.pop(("Pod", pod["metadata"]["name"]))
        cluster.collect_garbage()
        cluster.clock.advance(min(delay or 600, 600))


async def test_the_profiles_gpu_hours_end_a_pause() -> None:
    cluster = await paused({"maxGpuHours": 1})
    await pass_time(cluster, 1700)
    assert len(cluster.pods) == 3, "two GPUs for 1,700 seconds are less than an hour"
    await pass_time(cluster, 400)
    ready = cluster.status.condition("Ready")
    assert (cluster.status.phase, ready and ready.reason, cluster.pods) == ("Suspended", "BudgetExceeded", [])
    assert cluster.status.usage is not None
    assert cluster.status.usage.gpu_seconds < 3600 + 2 * 70, "it is looked at each minute"


async def test_the_profiles_deadline_ends_a_pause() -> None:
    cluster = await paused({"activeDeadlineSeconds": 900})
    await pass_time(cluster, 800)
    assert len(cluster.pods) == 3
    await pass_time(cluster, 200)
    assert cluster.status.failure is not None
    assert (cluster.status.failure.reason, [each["metadata"]["name"] for each in cluster.pods]) == ("DeadlineExceeded", [])


@pytest.mark.parametrize("limits", [None, {"workers": 8}])
async def test_the_jobs_own_limits_do_not(limits: dict[str, float] | None) -> None:
    cluster = await paused(limits, maxGpuHours=0.01, activeDeadlineSeconds=900)
    await pass_time(cluster, 10_000)
    ready = cluster.status.condition("Ready")
    assert (ready and ready.reason, len(cluster.pods)) == ("Paused", 3)


def test_a_measuring_run_is_bounded_while_its_job_is_left_alone() -> None:
    kept = Resolved(profile=ResolvedProfile(name="small", max_gpu_hours=1))
    spec = {**SPEC, "annotations": {RECONCILE: "disabled"}}
    run = begun().model_copy(update={"resolved": kept})
    late = step(run, make_pod(attempt=2), now=at(2 * DAY + 4 * HOUR), **spec)
    assert late.monitoring is not None
    assert late.monitoring.failure is not None
    assert late.monitoring.failure.reason == "DeadlineExceeded"
    free = step(begun(), make_pod(attempt=2), now=at(2 * DAY + 4 * HOUR), **spec)
    assert free.monitoring == begun().monitoring, "where no platform bounds it, it is left alone"
