"""A training that is stuck ends its attempt; one that loads, measures, saves or is slow does not."""

from dataclasses import replace

import pytest
from tests.builders import at, make_pod, make_report
from tests.unit.operator.looks import HEAD, PREPARING, WORKERS, ended, step

from finetune_api.status import Progress, Status
from finetune_operator.headway import seconds_of_a_step
from finetune_operator.times import rfc3339

LIMIT = {"progressDeadlineSeconds": 600}
HEADS_OWN = rfc3339(at(-7200))
"""By the head's clock, which may be wrong: that it is set is all that counts."""


def going(number: int = 5, *, stepping: bool = True, eta: int | None = None, stage: str = "Train"):
    progress = Progress(step=number, total_steps=10, eta_seconds=eta, last_step_time=HEADS_OWN if stepping else None)
    return make_report(stage, progress=progress)


def after(status: Status, seconds: float, report, *pods, **spec) -> Status:
    return step(status, HEAD, *(pods or WORKERS), report=report, now=at(seconds), **LIMIT, **spec)


TRAINING = after(PREPARING, 10, going())


def test_the_time_of_a_step_is_the_operators_own() -> None:
    assert TRAINING.progress is not None
    assert TRAINING.progress.last_step_time == rfc3339(at(10))
    same = after(TRAINING, 100, going())
    assert same.progress is not None
    assert same.progress.last_step_time == rfc3339(at(10))
    moved = after(same, 200, going(6))
    assert moved.progress is not None
    assert moved.progress.last_step_time == rfc3339(at(200))


def test_no_step_for_too_long_fails_the_attempt_and_another_follows() -> None:
    before = after(TRAINING, 609, going())
    assert before.attempt.running
    status = after(before, 610, going())
    assert status.failure is not None
    assert (status.failure.reason, status.failure.retryable, status.failure.stage) == ("NoProgress", True, "Train")
    assert status.failure.message == "no step after step 5 of 10 within 600 s (progressDeadlineSeconds)"
    assert (status.attempt.failures, status.attempt.end_reason, status.phase) == (1, "NoProgress", "Pending")
    gone = step(status, now=at(1300), **LIMIT)
    assert (gone.attempt.number, gone.attempt.running) == (2, True)


def test_the_last_attempt_that_is_stuck_fails_the_job() -> None:
    status = after(TRAINING, 610, going(), backoffLimit=0)
    assert status.phase == "Failed"
    assert status.failure is not None
    assert status.failure.reason == "NoProgress"


QUIET = {
    "it loads, compiles, measures or saves": going(stepping=False),
    "it measures the tuned model": going(stage="Evaluate"),
    "a step takes longer than the deadline": going(eta=1000),
    "the head says nothing of steps": make_report("Train"),
}


@pytest.mark.parametrize("report", QUIET.values(), ids=QUIET)
def test_there_is_no_false_alarm(report) -> None:
    status = TRAINING
    for seconds in range(60, 1900, 60):
        status = after(status, seconds, report)
    assert (status.attempt.running, status.attempt.failures, status.failure) == (True, 0, None)


def test_a_slow_step_has_ten_times_its_time() -> None:
    slow = after(PREPARING, 10, going(eta=1000))
    assert slow.progress is not None
    assert seconds_of_a_step(slow.progress) == 200.0
    assert after(slow, 2009, going(eta=1000)).attempt.running
    assert not after(slow, 2010, going(eta=1000)).attempt.running
    assert seconds_of_a_step(Progress(step=10, total_steps=10, eta_seconds=0)) == 0.0


def test_a_head_that_does_not_answer_is_no_training_that_is_stuck() -> None:
    """What the operator cannot see may well go on; after its return it sees another step."""
    silent = after(TRAINING, 5000, None)
    assert silent.attempt.running
    assert after(silent, 5001, going(9)).attempt.running


def test_an_attempt_that_begins_at_the_same_step_begins_its_own_time() -> None:
    lost = step(TRAINING, ended(143), now=at(20), **LIMIT)
    second = step(lost, now=at(40), **LIMIT)
    assert second.attempt.number == 2
    head, workers = make_pod(attempt=2), [make_pod("worker", attempt=2, index=index) for index in (0, 1)]
    report = going().model_copy(update={"attempt": 2})
    status = step(second, head, *workers, report=report, now=at(700), **LIMIT)
    assert status.attempt.running
    assert status.progress is not None
    assert status.progress.last_step_time == rfc3339(at(700))


def test_a_pod_that_is_going_is_left_alone() -> None:
    assert step(TRAINING, replace(HEAD, deletion=at(620)), *WORKERS, report=going(), now=at(615), **LIMIT).attempt.running
