"""maxGpuHours: the job stops at a checkpoint when its GPU-hours are used up, and goes on when they are raised, whatever crashes."""

from collections.abc import Iterator
from typing import Any

import pytest
from tests.builders import SETTINGS, Clock, at, make_pod, make_report, raw_job
from tests.fakes import KEY, Crash, FakeCluster, FakeKubelet
from tests.unit.operator.looks import HEAD, TRAINING, WORKERS, condition, step

from finetune_api import LABEL_ROLE
from finetune_api.status import Status, Usage
from finetune_operator.reconcile import reconcile

ON_GPUS = {"workers": {"min": 2, "max": 2}, "resourcesPerWorker": {"nvidia.com/gpu": 1}}
SPENT = TRAINING.model_copy(update={"usage": Usage(gpu_seconds=3600.0)})


def test_below_the_budget_nothing_happens() -> None:
    almost = TRAINING.model_copy(update={"usage": Usage(gpu_seconds=3599.0)})
    assert step(almost, HEAD, *WORKERS, report=make_report(), now=at(60), maxGpuHours=1).phase == "Training"
    assert step(SPENT, HEAD, *WORKERS, report=make_report(), now=at(60)).phase == "Training"


def test_a_used_up_budget_sends_the_pods_away_and_suspends_the_job() -> None:
    going = step(SPENT, HEAD, *WORKERS, report=make_report(), now=at(60), maxGpuHours=1)
    assert going.attempt.end_reason == "BudgetExceeded"
    assert condition(going, "Suspended") == ("False", "BudgetExceeded")
    gone = step(going, now=at(80), maxGpuHours=1)
    assert (gone.phase, gone.suspended_time, gone.finished) == ("Suspended", "2026-01-01T00:01:20Z", False)
    assert condition(gone, "Suspended") == ("True", "BudgetExceeded")
    assert gone.message == "maxGpuHours (1) is used up: raise or remove spec.maxGpuHours to go on from the last checkpoint"


def test_it_goes_on_when_the_budget_is_raised_or_removed() -> None:
    gone = step(step(SPENT, HEAD, report=make_report(), now=at(60), maxGpuHours=1), now=at(80), maxGpuHours=1)
    for spec in ({"maxGpuHours": 2}, {}):
        again = step(gone, now=at(1080), **spec)
        assert (again.phase, again.attempt.number, again.suspended_seconds) == ("Pending", 2, 1000)


def test_the_user_s_own_suspension_stands_before_the_budget_s() -> None:
    gone = step(step(SPENT, HEAD, report=make_report(), now=at(60), maxGpuHours=1), now=at(80), maxGpuHours=1)
    assert condition(step(gone, now=at(90), maxGpuHours=1, suspend=True), "Suspended") == ("True", "Suspended")
    assert condition(step(gone, now=at(90), maxGpuHours=1, suspend=False), "Suspended") == ("True", "BudgetExceeded")


def test_what_holds_no_gpu_may_end() -> None:
    """The last step used the budget up: the result is published nevertheless."""
    publishing = step(SPENT, HEAD, report=make_report("Publish"), now=at(60), maxGpuHours=1)
    assert (publishing.phase, publishing.attempt.running) == ("Publishing", True)
    done = step(publishing, HEAD, report=make_report("Publish", outcome="Succeeded"), now=at(70), maxGpuHours=1)
    assert done.phase == "Complete"


def test_no_attempt_follows_a_lost_one_on_a_used_up_budget() -> None:
    lost = step(SPENT, make_pod(phase="Failed", reason="Evicted"), report=None, now=at(60), maxGpuHours=1)
    assert (lost.phase, lost.attempt.number) == ("Suspended", 1)


class World:
    """A job of 20 steps on two GPUs, its cluster and its operator, and what its pods really held."""

    def __init__(self, hours: float | None) -> None:
        limit = {} if hours is None else {"maxGpuHours": hours}
        self.cluster = FakeCluster(Clock(), raw_job(compute=ON_GPUS, **limit))
        self.kubelet = FakeKubelet(self.cluster, total_steps=20)
        self.raised = False
        self.held = 0.0

    async def run(self) -> Status:
        """To the end. When the budget is used up, its user removes it."""
        for _ in range(400):
            try:
                delay = await reconcile(KEY, self.cluster, SETTINGS, self.cluster.clock.now)
            except Crash:
                continue
            self.cluster.collect_garbage()
            if self.cluster.status.phase == "Suspended" and not self.cluster.pods and not self.raised:
                assert self.cluster.status.condition("Suspended").reason == "BudgetExceeded"
                self.raised = True
                self.cluster.job["spec"].pop("maxGpuHours")
                self.cluster.edit_spec()
                continue
            if delay is None:
                return self.cluster.status
            self.kubelet.step()
            self.held += delay * sum(1 for _ in self.holders())
            self.cluster.clock.advance(delay)
        raise AssertionError(self.cluster.status)

    def holders(self) -> Iterator[dict[str, Any]]:
        return (
            pod for pod in self.cluster.pods if pod["metadata"]["labels"][LABEL_ROLE] == "worker" and pod["status"]["phase"] == "Running"
        )


async def test_a_whole_life_with_a_budget() -> None:
    world = World(0.05)
    status = await world.run()
    assert world.raised
    assert (status.phase, status.attempt.number, status.attempt.failures, status.attempt.preemptions) == ("Complete", 2, 0, 0)
    assert world.kubelet.trained == list(range(1, 21)), "no step was lost or done twice"
    reasons = [event.reason for event in world.cluster.events.values()]
    assert reasons.count("BudgetExceeded") == 1
    assert next(event.type for event in world.cluster.events.values() if event.reason == "BudgetExceeded") == "Warning"
    assert status.usage.gpu_seconds == pytest.approx(world.held, abs=2 * 2 * SETTINGS.poll_seconds)


async def writes_of_a_life() -> int:
    world = World(0.05)
    await world.run()
    return len(world.cluster.writes)


async def test_the_operator_may_end_after_any_write_of_that_life() -> None:
    """At each of its writes: the same end, the budget kept once, and GPU-seconds as true as without a crash."""
    for number in range(1, await writes_of_a_life() + 1):
        world = World(0.05)
        world.cluster.crash_after = number
        status = await world.run()
        assert world.raised, number
        assert (status.phase, status.attempt.number, status.attempt.preemptions) == ("Complete", 2, 0), number
        assert world.kubelet.trained == list(range(1, 21)), number
        assert [event.reason for event in world.cluster.events.values()].count("BudgetExceeded") <= 1, number
        assert status.usage.gpu_seconds == pytest.approx(world.held, abs=2 * 2 * SETTINGS.poll_seconds), number
        assert list(world.cluster.objects) == [("Pod", "bot-2-head")], number
