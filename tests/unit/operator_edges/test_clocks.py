"""A clock that is set forward or back by an hour, while the operator runs and between two of its lives: no job fails of that alone."""

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.builders import SETTINGS, Clock, at, make_job, make_pod, make_report, raw_job, terminated
from tests.fakes import KEY, FakeCluster, FakeKubelet

from finetune_api.reasons import Reason
from finetune_api.status import Progress, Status
from finetune_operator import clock as clocks
from finetune_operator.election import _Steady
from finetune_operator.job_series import JobCollector
from finetune_operator.lifecycle import advance
from finetune_operator.observed import Observed, Pod
from finetune_operator.reconcile import reconcile
from finetune_operator.times import later, rfc3339

HOUR = 3600.0
LOOKS = 14
"""A life without trouble has fewer looks that change something."""


class Life:
    """A job's life on a cluster in memory, under an operator whose clock is set at one of its looks."""

    def __init__(self, **spec: Any) -> None:
        self.cluster = FakeCluster(Clock(), raw_job(**spec))
        self.kubelet = FakeKubelet(self.cluster)
        self.set_time: datetime | None = None

    def set_clock(self, seconds: float, *, noticed: bool) -> None:
        self.cluster.clock.advance(seconds)
        self.set_time = self.cluster.clock.now if noticed else self.set_time

    async def look(self) -> None:
        delay = await reconcile(KEY, self.cluster, SETTINGS, self.cluster.clock.now, self.set_time)
        self.cluster.clock.advance(min(delay or 10.0, 10.0))
        self.check()

    def check(self) -> None:
        """Nothing that the status or the metrics tell takes less than no time."""
        status = self.cluster.status
        spans = [(status.start_time, status.completion_time), (status.attempt.start_time, status.attempt.end_time)]
        spans += [(stage.start_time, stage.end_time) for stage in status.stages if stage.state == "Failed"]
        assert [span for span in spans if all(span) and later(span[0] or "", 0) > later(span[1] or "", 0)] == []
        assert status.suspended_seconds >= 0
        assert status.usage is None or status.usage.gpu_seconds >= 0
        now = self.cluster.clock.now.timestamp()
        registry, series = CollectorRegistry(), JobCollector(exposed=lambda: True, clock=lambda: now)
        assert self.cluster.job is not None
        series.see(self.cluster.job, gone=False)
        registry.register(series)
        told = [sample for family in text_string_to_metric_families(generate_latest(registry).decode()) for sample in family.samples]
        assert len(told) > 5
        assert [sample for sample in told if sample.value < 0] == []


@pytest.mark.parametrize("noticed", [True, False], ids=["in a life of the operator", "between two"])
@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forward", "back"])
async def test_a_life_goes_well_wherever_in_it_the_clock_is_set(seconds: float, noticed: bool) -> None:
    for when in range(LOOKS):
        life = Life(activeDeadlineSeconds=2 * int(HOUR))
        for number in range(60):
            if number == when:
                life.set_clock(seconds, noticed=noticed)
            await life.look()
            life.kubelet.step()
            if life.cluster.status.finished:
                break
        status = life.cluster.status
        # Between two lives of the operator an hour is an hour: who waited for pods before has waited for longer than they may take.
        late = seconds > 0 and not noticed and status.failure is not None
        if late:
            assert status.failure is not None
            assert status.failure.reason == Reason.PRE_RUNNING_DEADLINE_EXCEEDED
            assert when in WAITING, when
        else:
            assert (when, status.phase, status.attempt.number, status.attempt.failures) == (when, "Complete", 1, 0)


WAITING = range(1, 5)
"""Looks before which pods are waited for."""


def look(
    status: Status,
    *pods: Pod,
    now: datetime,
    report: Any = None,
    set_time: datetime | None = None,
    looked: float | None = None,
    **spec: Any,
) -> Status:
    observed = Observed(tuple(pods), frozenset({1}), report, clock_set=set_time, looked=looked)
    after = advance(make_job(status=status, **spec), observed, SETTINGS, now)
    assert advance(make_job(status=after, **spec), observed, SETTINGS, now) == after, "a second look at the same changes nothing"
    return after


HEAD, WORKERS = make_pod(), (make_pod("worker", index=0), make_pod("worker", index=1))
BEGUN = look(Status(), now=at(0))
PREPARING = look(BEGUN, HEAD, report=make_report("Prepare"), now=at(0))


def training(step: int) -> Any:
    return make_report("Train", progress=Progress(step=step, total_steps=10, percent=10 * step, last_step_time=rfc3339(at(0))))


TRAINING = look(PREPARING, HEAD, *WORKERS, report=training(5), now=at(10))


@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forward", "back"])
def test_a_training_is_not_stuck_because_the_clock_was_set_and_is_when_it_is_stuck(seconds: float) -> None:
    then = at(20 + seconds)
    status = look(TRAINING, HEAD, *WORKERS, report=training(5), now=then, set_time=then)
    assert (status.attempt.running, status.attempt.failures) == (True, 0)
    assert status.progress is not None
    assert status.progress.last_step_time == rfc3339(then)
    almost, over = then + timedelta(seconds=1799), then + timedelta(seconds=1800)
    assert look(status, HEAD, *WORKERS, report=training(5), now=almost, set_time=then).attempt.running
    ended = look(status, HEAD, *WORKERS, report=training(5), now=over, set_time=then)
    assert ended.failure is not None
    assert ended.failure.reason == Reason.NO_PROGRESS


@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forward", "back"])
def test_pods_are_waited_for_as_long_as_ever_though_the_clock_was_set(seconds: float) -> None:
    pending, then = make_pod(phase="Pending"), at(20 + seconds)
    status = look(BEGUN, pending, now=then, set_time=then)
    assert (status.attempt.running, status.attempt.waiting_time) == (True, rfc3339(then))
    assert look(status, pending, now=then + timedelta(seconds=1799), set_time=then).attempt.running
    assert look(status, pending, now=then + timedelta(seconds=1800), set_time=then).phase == "Failed"


def test_an_hour_back_between_two_lives_holds_nothing_up_for_an_hour() -> None:
    back = at(10 - HOUR)
    moved = look(TRAINING, HEAD, *WORKERS, report=training(6), now=back)
    assert moved.progress is not None
    assert (moved.progress.step, moved.progress.last_step_time) == (6, rfc3339(back)), "progress is told"
    lost = look(TRAINING, make_pod(phase="Failed", containerStatuses=terminated(1)), now=at(20))
    assert lost.attempt.retry_time is not None
    assert look(lost, now=back).attempt.number == 2, "the next attempt does not wait for the clock to come round"


def test_a_deadline_of_the_job_is_told_by_the_wall_clock_and_no_other() -> None:
    """The user says seconds from the job's begin; only the wall clock is the same for all lives of the operator."""
    spec = {"activeDeadlineSeconds": 1800}
    over = look(TRAINING, HEAD, *WORKERS, report=training(6), now=at(HOUR), set_time=at(HOUR), **spec)
    assert over.failure is not None
    assert over.failure.reason == Reason.DEADLINE_EXCEEDED
    done = make_report("Publish", outcome="Succeeded")
    assert look(TRAINING, HEAD, *WORKERS, report=done, now=at(HOUR), **spec).phase == "Complete", "what has been done in time counts"


class Machine:
    """The clocks of a machine."""

    def __init__(self) -> None:
        self.wall, self.steady = 1.8e9, 1000.0

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: made.wall)
        patch.setattr("finetune_operator.clock.time", SimpleNamespace(time=lambda: made.wall, monotonic=lambda: made.steady))
        patch.setattr("finetune_operator.election.time", SimpleNamespace(time=lambda: made.wall, monotonic=lambda: made.steady))
        yield made


def test_a_clock_that_was_set_is_noticed_and_one_that_runs_on_is_not(machine: Machine) -> None:
    clock = clocks.Clock()
    for seconds in (0.5, 4.0, 86400.0):
        machine.passes(seconds)
        assert clock.now().timestamp() == machine.wall
    machine.wall += clocks.SET_SECONDS - 1
    clock.now()
    assert clock.set_time is None
    for seconds in (HOUR, -HOUR):
        machine.passes(60)
        machine.wall += seconds
        assert clock.now() == clock.set_time
        set_time = clock.set_time
        machine.passes(60)
        clock.now()
        assert clock.set_time == set_time


class OneLease:
    """A Lease as the client's election sees it: what its holder wrote last. `fails`: the API server cannot be reached."""

    def __init__(self, identity: str) -> None:
        self.identity, self.name, self.namespace = identity, "lease", "system"
        self.record: Any = None
        self.fails = False

    async def get(self, *_: object) -> tuple[bool, Any]:
        return (False, SimpleNamespace(body=None, reason="no answer")) if self.fails else (True, self.record)

    async def update(self, _name: str, _namespace: str, record: Any) -> bool:
        self.record = record
        return not self.fails


def candidate(identity: str, held_by: str | None) -> tuple[_Steady, OneLease]:
    lease = OneLease(identity)
    if held_by:
        lease.record = LeaderElectionRecord(held_by, "15", "then", "then")
    config = SimpleNamespace(lock=lease, lease_duration=15, renew_deadline=10, retry_period=2)
    return _Steady(config), lease


@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forward", "back"])
async def test_one_that_stands_by_waits_as_long_as_a_lease_lasts_whatever_its_clock_is_set_to(machine: Machine, seconds: float) -> None:
    standby, _ = candidate("b", held_by="a")
    assert not await standby.try_acquire_or_renew()
    machine.passes(2)
    machine.wall += seconds
    assert not await standby.try_acquire_or_renew(), "a leader that lives would be succeeded"
    machine.passes(14)
    assert not await standby.try_acquire_or_renew()
    machine.passes(2)
    assert await standby.try_acquire_or_renew(), "nobody would lead for an hour"


async def test_a_leader_without_a_network_gives_up_in_time_though_its_clock_is_set_back(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, lease = candidate("a", held_by="a")
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        machine.passes(seconds)
        if len(slept) == 3:
            lease.fails = True
        if len(slept) == 4:
            machine.wall -= HOUR
        assert len(slept) < 100, "it still believes in its lead"

    monkeypatch.setattr("finetune_operator.election.asyncio", SimpleNamespace(sleep=sleep, timeout=None))
    await leader.renew_loop()
    assert sum(slept[2:]) == 10.0, "from the last renewal"
