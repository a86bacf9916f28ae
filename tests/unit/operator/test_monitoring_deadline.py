"""A measuring run that does not end: how long it may take, and what is told of it."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from tests.builders import SETTINGS, at, make_job, make_pod
from tests.unit.operator.looks import condition, step
from tests.unit.operator.test_monitoring import DAY, HOUR, NIGHTLY, SPEC, begun, complete, figures, ran, run_report

from finetune_api.reasons import ADVICE, Reason
from finetune_api.status import Status, Usage
from finetune_operator.monitoring import acting
from finetune_operator.observed import Pod
from finetune_operator.plan import desired_objects
from finetune_operator.times import rfc3339
from finetune_operator.transitions import events_between


def goes_on(status: Status, now: datetime, *pods: Pod, **spec) -> Status:
    """A look at the run, whose head says that it is at work."""
    found = pods or (make_pod(attempt=2),)
    return step(status, *found, report=run_report(message="measuring"), now=now, **{**SPEC, **spec})


@pytest.mark.parametrize(
    ("schedule", "deadline", "seconds", "words"),
    [
        ("0 3 * * *", None, DAY, "the 86400 s that its schedule leaves to it"),
        ("0 3 * * 1", None, DAY, "the 86400 s that its schedule leaves to it"),
        ("0 */8 * * *", None, 8 * HOUR, "the 28800 s that its schedule leaves to it"),
        ("*/5 * * * *", None, 6 * HOUR, "the 21600 s that its schedule leaves to it"),
        ("0 0 29 2 *", None, DAY, "the 86400 s that its schedule leaves to it"),
        ("0 3 * * *", 900, 900, "activeDeadlineSeconds (900)"),
        ("0 3 * * *", 9 * DAY, DAY, "the 86400 s that its schedule leaves to it"),
    ],
)
def test_a_run_has_the_time_that_its_schedule_leaves_and_no_more_than_the_job(schedule, deadline, seconds, words):
    spec = {**SPEC, "monitoring": {**NIGHTLY, "schedule": schedule}, **({} if deadline is None else {"activeDeadlineSeconds": deadline})}
    due = complete(**spec).monitoring.next_run_time
    start = datetime.fromisoformat(due)
    status = step(complete(**spec), now=start, **spec)
    kept = goes_on(status, start + timedelta(seconds=seconds - 1), **spec)
    assert kept.monitoring.run.running
    ended = goes_on(kept, start + timedelta(seconds=seconds), **spec)
    failure = ended.monitoring.failure
    assert (failure.reason, failure.message) == (Reason.DEADLINE_EXCEEDED, f"run 2 has not ended within {words}")
    assert failure.hint == ADVICE[Reason.DEADLINE_EXCEEDED].hint
    assert condition(ended, "Degraded") == ("Unknown", Reason.DEADLINE_EXCEEDED)
    assert not desired_objects(make_job(status=ended, **spec), acting(ended), SETTINGS)
    assert (ended.phase, ended.monitoring.failed_runs, ended.failure) == ("Complete", 1, None)
    assert [(each.type, each.reason) for each in events_between(make_job(**spec), kept, ended)] == [("Warning", "DeadlineExceeded")]


def test_a_run_without_pods_does_not_stay_either():
    """The pods of a namespace that refuses them are waited for less long than for ever, whatever preRunningDeadlineSeconds is."""
    spec = {"preRunningDeadlineSeconds": 10 * DAY}
    status = step(begun(**spec), now=at(DAY + 3 * HOUR - 1), **SPEC, **spec)
    assert status.monitoring.run.running
    assert step(status, now=at(DAY + 3 * HOUR), **SPEC, **spec).monitoring.failure.reason == Reason.DEADLINE_EXCEEDED


def test_the_next_run_is_measured_as_if_nothing_had_been():
    hung = goes_on(begun(), at(DAY + 3 * HOUR))
    assert hung.monitoring.next_run_time == "2026-01-03T03:00:00Z"
    still_there = step(hung, make_pod(attempt=2), now=at(2 * DAY + 3 * HOUR), **SPEC)
    assert still_there == hung, "the pods before it go first"
    again = step(hung, now=at(2 * DAY + 3 * HOUR), **SPEC)
    assert again.monitoring.run.number == 3
    assert condition(ran(again, 3, at(2 * DAY + 3 * HOUR + 60)), "Degraded") == ("False", Reason.QUALITY_HELD)


def test_figures_that_come_with_the_last_look_count():
    assert condition(ran(begun(), now=at(DAY + 3 * HOUR)), "Degraded") == ("False", Reason.QUALITY_HELD)


def test_time_in_a_queue_does_not_count():
    gated = replace(make_pod(attempt=2, phase="Pending"), gated=True)
    queued = step(begun(), gated, now=at(4 * HOUR), **SPEC)
    assert queued.monitoring.run.active_time is None
    assert step(queued, gated, now=at(20 * DAY), **SPEC) == queued
    let_in = goes_on(queued, at(20 * DAY))
    assert let_in.monitoring.run.active_time == "2026-01-21T00:00:00Z"
    assert goes_on(let_in, at(21 * DAY - 1)).monitoring.run.running
    assert goes_on(let_in, at(21 * DAY)).monitoring.failure.reason == Reason.DEADLINE_EXCEEDED


def test_a_run_of_an_older_operator_gets_its_deadline_from_the_first_look_on():
    status = begun()
    run = status.monitoring.run.model_copy(update={"active_time": None})
    older = status.model_copy(update={"monitoring": status.monitoring.model_copy(update={"run": run})})
    seen = goes_on(older, at(5 * DAY))
    assert seen.monitoring.run.active_time == "2026-01-06T00:00:00Z"
    assert goes_on(seen, at(6 * DAY)).monitoring.failure.reason == Reason.DEADLINE_EXCEEDED


def test_a_run_ends_when_the_jobs_gpu_hours_are_used_up():
    """Else a run of a day on eight GPUs would be had for whatever is left of the budget."""
    spec = {"maxGpuHours": 2}
    used = Usage(gpu_seconds=7199.0, counted_time=rfc3339(at(DAY)))
    status = begun(**spec).model_copy(update={"usage": used})
    assert goes_on(status, at(DAY + 60), **spec).monitoring.run.running
    over = status.model_copy(update={"usage": used.model_copy(update={"gpu_seconds": 7200.0})})
    ended = goes_on(over, at(DAY + 60), **spec)
    assert (ended.monitoring.run.running, ended.monitoring.next_run_time) == (False, None)
    failure = ended.monitoring.failure
    assert (failure.reason, failure.message) == (
        Reason.BUDGET_EXCEEDED,
        "run 2 was ended: maxGpuHours (2) is used up: raise or remove spec.maxGpuHours to go on",
    )
    assert (ended.phase, condition(ended, "Degraded")) == ("Complete", ("Unknown", Reason.BUDGET_EXCEEDED))
    done = step(over, make_pod(attempt=2), report=run_report(outcome="Succeeded", fresh=figures()), now=at(DAY + 60), **SPEC, **spec)
    assert done.monitoring.runs == 1, "what was measured counts"
