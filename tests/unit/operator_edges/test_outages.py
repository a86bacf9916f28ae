"""An API server that is away for half an hour: no job fails because the operator could not look, or could not do what it had begun."""

from types import SimpleNamespace
from typing import Any

import pytest
from tests.builders import SETTINGS, Clock, at, make_pod, make_report, raw_job
from tests.fakes import KEY, FakeCluster, FakeKubelet
from tests.unit.operator_edges.test_clocks import BEGUN, HEAD, PREPARING, WORKERS, look, training

from finetune_api.reasons import Reason
from finetune_api.status import Status
from finetune_operator.clock import GAP_SECONDS, Looks
from finetune_operator.look import SETTLE_SECONDS
from finetune_operator.port import ApiError, RawJob
from finetune_operator.queue import BACKOFF_MAX_SECONDS, _wait_after
from finetune_operator.reconcile import reconcile

AWAY = 1800.0
"""As long as a job's pods may take to run, and its training to take a step."""
CALLS = 32
"""A life without trouble has fewer calls that change something."""


class FarCluster(FakeCluster):
    """A cluster whose API server is away for a while, from one of its calls on, and which counts looks as the real one does."""

    def __init__(self, leave_at: int) -> None:
        super().__init__(Clock(), raw_job())
        self.calls, self.leave_at, self.away_until = 0, leave_at, at(-1)
        self.looks = Looks(SETTINGS.poll_seconds)

    def reached(self) -> None:
        self.calls += 1
        if self.calls == self.leave_at:
            self.away_until = at((self.clock.now - at(0)).total_seconds() + AWAY)
        if self.clock.now < self.away_until:
            raise ApiError(0, "Unreachable", "no answer from the API server")

    async def read(self, key: Any) -> RawJob | None:
        self.reached()
        raw = await super().read(key)
        return RawJob(raw.job, raw.pods, raw.config_maps, raw.events, raw.profiles, self.looks.seen(key)) if raw else None

    async def patch_status(self, job: Any, status: Status) -> Any:
        self.reached()
        return await super().patch_status(job, status)

    async def apply(self, manifest: Any) -> str:
        self.reached()
        return await super().apply(manifest)

    async def delete(self, *given: Any, **named: Any) -> None:
        self.reached()
        await super().delete(*given, **named)


@pytest.mark.parametrize("restarted", [False, True], ids=["the same process", "another process"])
async def test_a_life_goes_well_wherever_in_it_the_api_server_goes_away(monkeypatch: pytest.MonkeyPatch, restarted: bool) -> None:
    """`another`: one that leads gives up without the API server, and its container is started again."""
    for leave_at in range(1, CALLS):
        cluster = FarCluster(leave_at)
        kubelet = FakeKubelet(cluster)
        steady = SimpleNamespace(monotonic=lambda cluster=cluster: (cluster.clock.now - at(0)).total_seconds())
        monkeypatch.setattr("finetune_operator.clock.time", steady)
        errors, longest = 0, 0.0
        for _ in range(100):
            try:
                wait = await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
                errors = 0
            except ApiError as error:
                errors += 1
                wait = _wait_after(error, errors)
                cluster.looks = Looks(SETTINGS.poll_seconds) if restarted else cluster.looks
            if wait is None and cluster.status.finished:
                break
            longest = max(longest, wait or 0.0)
            cluster.clock.advance(wait or 10.0)
            kubelet.step()
        assert (leave_at, cluster.status.phase, cluster.status.attempt.number) == (leave_at, "Complete", 1), cluster.status.message
        assert (cluster.names("Pod"), cluster.names("ConfigMap"), longest <= BACKOFF_MAX_SECONDS) == ({"bot-1-head"}, set(), True)
        if cluster.calls >= leave_at:
            assert cluster.clock.now >= at(AWAY)


def test_a_wait_after_errors_is_bounded() -> None:
    waits = [_wait_after(ApiError(503, "ServiceUnavailable", "away"), number) for number in range(1, 200)]
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert set(waits[7:]) == {BACKOFF_MAX_SECONDS} == {120.0}
    assert sum(waits[:20]) < AWAY < sum(waits[:30]), "in half an hour it asks about twenty times"


@pytest.mark.parametrize("looked", [0.0, SETTLE_SECONDS - 1])
def test_what_is_missing_after_an_absence_has_five_minutes(looked: float) -> None:
    pending, silent = make_pod(phase="Pending"), make_pod()
    for pod in pending, silent:
        assert look(BEGUN, pod, now=at(2 * AWAY), looked=looked).attempt.running
        over = look(BEGUN, pod, now=at(2 * AWAY), looked=SETTLE_SECONDS)
        assert over.failure is not None
        assert over.failure.reason == Reason.PRE_RUNNING_DEADLINE_EXCEEDED
    stuck = look(PREPARING, HEAD, *WORKERS, report=training(5), now=at(10))
    assert look(stuck, HEAD, *WORKERS, report=training(5), now=at(2 * AWAY), looked=looked).attempt.running
    assert not look(stuck, HEAD, *WORKERS, report=training(5), now=at(2 * AWAY), looked=SETTLE_SECONDS).attempt.running


def test_a_short_deadline_is_not_made_longer_than_it_is_twice() -> None:
    pending, spec = make_pod(phase="Pending"), {"preRunningDeadlineSeconds": 30}
    assert look(BEGUN, pending, now=at(AWAY), looked=29.0, **spec).attempt.running
    assert look(BEGUN, pending, now=at(AWAY), looked=30.0, **spec).phase == "Failed"


def test_workers_that_ran_while_nobody_looked_and_are_gone_since_are_waited_for_anew() -> None:
    wanted = look(PREPARING, HEAD, report=make_report("Train"), now=at(10))
    assert wanted.attempt.waiting_time is not None
    back = look(wanted, HEAD, WORKERS[0], report=training(5), now=at(2 * AWAY))
    assert back.attempt.running, "five steps were taken: all workers ran"
    assert not look(wanted, HEAD, WORKERS[0], report=make_report("Train"), now=at(2 * AWAY)).attempt.running


def test_looks_are_counted_until_a_gap_and_then_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("finetune_operator.clock.time", SimpleNamespace(monotonic=lambda: now))
    looks, rare, key = Looks(10.0), Looks(600.0), ("team", "bot")
    assert (looks.seen(key), rare.seen(key)) == (0.0, 0.0)
    now = GAP_SECONDS - 1
    assert (looks.seen(key), looks.seen(("team", "cat"))) == (now, 0.0)
    now = 2 * GAP_SECONDS
    assert looks.seen(key) == 0.0
    now = 2 * GAP_SECONDS + 5
    assert looks.seen(key) == 5.0
    looks.forget(key)
    assert looks.seen(key) == 0.0
    now = 1700.0
    assert rare.seen(key) == 1700.0, "looks that come every ten minutes are no gap"
