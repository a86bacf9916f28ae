"""GPU-seconds are what the pods' own times say, whatever their head says, in however many looks they are counted."""

from datetime import datetime

import pytest
from tests.builders import SETTINGS, T0, at, make_job, make_pod, make_report
from tests.unit.operator.looks import BEGUN, HEAD, TRAINING, step

from finetune_api.status import Status, Usage
from finetune_operator.lifecycle import advance
from finetune_operator.observed import Observed, Pod, pod_from
from finetune_operator.times import rfc3339
from finetune_operator.usage import with_gpu_seconds

GPUS = {"nvidia.com/gpu": "2", "cpu": "8"}


def holder(scheduled: float | None, ended: float | None = None, *, index: int = 0, gone: float | None = None) -> Pod:
    """A worker with two GPUs that was given a node, and ended, so long after T0."""
    conditions = [] if scheduled is None else [condition("PodScheduled", scheduled)]
    phase, states = "Pending" if scheduled is None else "Running", []
    if ended is not None:
        phase, states = "Failed", [{"name": "c", "state": {"terminated": {"exitCode": 1, "finishedAt": rfc3339(at(ended))}}}]
    if gone is not None:
        phase, conditions = "Failed", [*conditions, condition("DisruptionTarget", gone)]
    name = f"bot-1-worker-{index}"
    meta = {"name": name, "namespace": "team-a", "uid": name, "creationTimestamp": rfc3339(T0)}
    meta["labels"] = {"finetune.dev/role": "worker", "finetune.dev/attempt": "1"}
    spec = {"containers": [{"name": "worker", "resources": {"limits": GPUS}}]}
    return pod_from({"metadata": meta, "spec": spec, "status": {"phase": phase, "conditions": conditions, "containerStatuses": states}})


def condition(kind: str, seconds: float) -> dict[str, str]:
    return {"type": kind, "status": "True", "lastTransitionTime": rfc3339(at(seconds))}


def counted(*looks: tuple[float, tuple[Pod, ...]]) -> float:
    """GPU-seconds after looks at these times."""
    status = Status()
    for seconds, pods in looks:
        status = with_gpu_seconds(status, Observed(pods), at(seconds))
    return status.usage.gpu_seconds if status.usage else 0.0


@pytest.mark.parametrize(
    ("looks", "seconds"),
    [
        ([(60, (holder(None),))], 0),
        ([(60, (holder(10),))], 2 * 50),
        ([(60, (holder(10),)), (60, (holder(10),)), (100, (holder(10),))], 2 * 90),
        ([(60, (holder(10, 40),)), (100, (holder(10, 40),))], 2 * 30),
        ([(20, (holder(10),)), (100, (holder(10, 40),))], 2 * 30),
        ([(60, (holder(10), holder(30, index=1)))], 2 * (50 + 30)),
        ([(60, (holder(10),)), (80, ())], 2 * 50),
        ([(60, (holder(10),)), (80, ()), (200, (holder(150),))], 2 * (50 + 50)),
        ([(60, (holder(10, gone=45),))], 2 * 35),
        ([(60, (holder(70),))], 0),
    ],
    ids=[
        "no node, no GPU",
        "from when it has its node",
        "each second once",
        "no longer than it ran",
        "its end is seen late",
        "two pods",
        "gone: up to the last look",
        "the next attempt",
        "its node is lost",
        "given its node after the look began",
    ],
)
def test_what_pods_hold(looks: list[tuple[float, tuple[Pod, ...]]], seconds: float) -> None:
    assert counted(*looks) == seconds


def test_a_fraction_of_a_second_is_neither_lost_nor_counted_twice() -> None:
    pods, status = (holder(0),), Status()
    for tenth in range(1, 1001):
        status = with_gpu_seconds(status, Observed(pods), at(tenth / 10))
    assert status.usage == Usage(gpu_seconds=200.0, counted_time=rfc3339(at(100)))


def test_pods_without_gpus_hold_none() -> None:
    assert with_gpu_seconds(Status(), Observed((make_pod("worker", startTime=rfc3339(T0)),)), at(60)) == Status()


def test_a_head_says_nothing_about_gpu_seconds() -> None:
    lie = make_report(usage=Usage(gpu_seconds=1e6, trained_tokens=5, counted_time="2020-01-01T00:00:00Z"))
    status = step(TRAINING, HEAD, holder(10), holder(10, index=1), report=lie, now=at(60))
    assert status.usage == Usage(gpu_seconds=200.0, trained_tokens=5, counted_time=rfc3339(at(60)))


def looks_at(before: Status, now: datetime, *pods: Pod) -> Status:
    return advance(make_job(status=before), Observed(tuple(pods), frozenset({1}), make_report("Train")), SETTINGS, now)


def test_gpu_seconds_alone_are_written_as_seldom_as_progress() -> None:
    """While workers wait for others, nothing else changes."""
    pods = (HEAD, holder(10), holder(None, index=1))
    first = looks_at(BEGUN, at(20), *pods)
    second = looks_at(first, at(25), *pods)
    assert second == first
    third = looks_at(second, at(20 + SETTINGS.poll_seconds), *pods)
    assert third.usage == Usage(gpu_seconds=2 * 20.0, counted_time=rfc3339(at(30)))


def test_gpu_seconds_are_no_sign_of_life_of_the_trainer() -> None:
    pods = (HEAD, holder(10), holder(10, index=1))
    first = looks_at(TRAINING, at(20), *pods)
    assert first.progress is not None
    later = looks_at(first, at(60), *pods)
    assert later.usage != first.usage
    assert later.progress is not None
    assert later.progress.last_update_time == first.progress.last_update_time


def test_pods_that_outlive_their_job_are_counted() -> None:
    ended = step(TRAINING, HEAD, holder(10), report=make_report("Publish", outcome="Succeeded", workers_wanted=0), now=at(60))
    assert ended.finished
    assert step(ended, HEAD, holder(10), now=at(80)).usage == Usage(gpu_seconds=140.0, counted_time=rfc3339(at(80)))
