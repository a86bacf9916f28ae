"""The published model is measured again: when, with which pods, and what the status tells of it."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from tests.builders import SETTINGS, T0, UID, at, make_job, make_pod, make_report, stages, terminated
from tests.unit.operator.looks import condition, step

from finetune_api import ANNOTATION_RECONCILE
from finetune_api.monitoring_status import FreshFigure, MonitoredResult
from finetune_api.reasons import Reason
from finetune_api.report import Report, parse_report, termination_message
from finetune_api.status import Artifact, Evaluation, EvaluationResult, Status, Usage
from finetune_api.v1alpha1 import MonitoringPlan
from finetune_operator.lifecycle import advance
from finetune_operator.monitoring import acting, judged, next_time
from finetune_operator.observed import Observed, Waiting
from finetune_operator.pace import next_look
from finetune_operator.plan import desired_objects
from finetune_operator.transitions import events_between

HOUR, DAY = 3600, 86400
SOON_AFTER = at(3 * HOUR + 60)
NIGHTLY = {"schedule": "0 3 * * *", "suites": [{"name": "task", "source": "pvc://fresh/today.jsonl"}]}
EVALUATION = {
    "suites": [
        {"name": "task", "source": "validation", "metrics": ["loss", "f1"]},
        {"name": "other", "configMap": {"name": "sets", "key": "a.jsonl"}, "metrics": ["f1"]},
    ]
}
RELEASED = Evaluation(results=(EvaluationResult(metric="task/loss", value=1.0), EvaluationResult(metric="task/f1", value=0.8)))
ADAPTER = Artifact(kind="adapter", uri="pvc://models/bot/adapter", digest="sha256:0", bytes=1)
SPEC = {"evaluation": EVALUATION, "monitoring": NIGHTLY}


def complete(**spec) -> Status:
    """A job that has just published its result; T0 is midnight."""
    begun = step(Status(), **spec)
    report = make_report("Publish", outcome="Succeeded", stages=stages("Publish", ended=True), artifacts=(ADAPTER,), evaluation=RELEASED)
    return step(begun, make_pod(), report=report, **spec)


def figures(loss: float = 1.0, f1: float = 0.8, margin: float = 0.1) -> tuple[FreshFigure, ...]:
    values = {"task/loss": loss, "task/f1": f1}
    return tuple(FreshFigure(metric=name, value=value, low=value - margin, high=value + margin, n=20) for name, value in values.items())


def run_report(number: int = 2, **given) -> Report:
    return Report(job_uid=UID, attempt=number, **given)


def begun(**spec) -> Status:
    """The first run has just begun, at three."""
    return step(complete(**{**SPEC, **spec}), now=at(3 * HOUR), **{**SPEC, **spec})


def ran(status: Status, number: int = 2, now: datetime = SOON_AFTER, **given) -> Status:
    report = run_report(number, outcome="Succeeded", **{"fresh": figures(), **given})
    return step(status, make_pod(attempt=number), report=report, now=now, **SPEC)


def test_a_schedule_is_cron_in_utc():
    assert next_time("0 3 * * *", T0) == at(3 * HOUR)
    assert next_time("0 3 * * *", at(3 * HOUR)) == at(DAY + 3 * HOUR)
    assert next_time("*/15 * * * 1", datetime(2026, 1, 1, tzinfo=UTC)) == datetime(2026, 1, 5, tzinfo=UTC)  # a Thursday, then a Monday
    assert next_time("0 0 29 2 *", T0) == datetime(2028, 2, 29, tzinfo=UTC)
    assert next_time("0 0 30-31 2-2 *", T0) is None


def test_a_job_that_was_published_gets_an_appointment():
    status = complete(**SPEC)
    assert status.monitoring is not None
    assert status.monitoring.next_run_time == "2026-01-01T03:00:00Z"
    assert condition(status, "Degraded") == ("Unknown", Reason.PENDING)
    assert condition(status, "Complete") == condition(status, "Ready") == ("True", Reason.SUCCEEDED)
    job = make_job(status=status, **SPEC)
    assert next_look(job, status, Observed((make_pod(phase="Succeeded"),)), SETTINGS, at(HOUR)) == 2 * HOUR


@pytest.mark.parametrize("end", [{"outcome": "Failed"}, {"outcome": "Succeeded", "sufficient": True}])
def test_a_job_that_published_nothing_is_not_measured_again(end):
    loop = {**SPEC, "backoffLimit": 0, "baseline": {"prompts": [{"name": "plain"}], "sufficientIf": {"metric": "task/f1", "atLeast": 0.1}}}
    head = make_pod(phase="Failed", containerStatuses=terminated(1))
    status = step(step(Status(), **loop), head, report=make_report("Prepare", **end), **loop)
    assert status.phase in ("Complete", "Failed")
    later = step(status, now=at(DAY), **loop)
    assert later.monitoring is None
    assert later.condition("Degraded") is None


def test_before_its_time_nothing_changes_and_at_its_time_a_run_begins():
    status = complete(**SPEC)
    assert step(status, make_pod(phase="Succeeded"), now=at(3 * HOUR - 1), **SPEC) == status
    after = step(status, make_pod(phase="Succeeded"), now=at(3 * HOUR), **SPEC)
    assert after.monitoring.run.number == 2
    assert after.monitoring.run.running
    assert after.monitoring.next_run_time is None
    assert after.attempt == status.attempt
    assert after.phase == "Complete"


def test_a_run_waits_for_the_pods_before_it():
    status = complete(**SPEC)
    assert step(status, make_pod(), now=at(3 * HOUR), **SPEC) == status
    assert not desired_objects(make_job(status=status, **SPEC), acting(status), SETTINGS)


def test_a_run_has_its_own_objects_and_mounts_only_what_it_needs():
    served = {**NIGHTLY, "endpoint": {"url": "http://served/v1", "model": "bot", "secretRef": {"name": "served"}}}
    data = {"train": {"source": "pvc://old/train.jsonl"}}
    volumes = {}
    for plan in (NIGHTLY, served):
        spec = {**SPEC, "data": data, "monitoring": plan, "model": {"source": "pvc://base/model"}}
        status = begun(**spec)
        objects = desired_objects(make_job(status=status, **spec), acting(status), SETTINGS)
        assert [each["metadata"]["name"] for each in objects if each["kind"] != "Secret"] == ["bot-2"] * 3 + ["bot-2-head"]
        told = json.loads(objects[0]["data"]["job.json"])
        assert told["spec"]["monitoring"]["schedule"] == "0 3 * * *"
        (head,) = (each for each in objects if each["kind"] == "Pod")
        mounts = {each["mountPath"].removeprefix("/mnt/finetune/") for each in head["spec"]["containers"][0]["volumeMounts"]}
        volumes[plan is served] = {mount for mount in mounts if not mount.startswith("/")}
    assert volumes == {False: {"claims/base", "claims/fresh", "claims/models"}, True: {"claims/fresh", "claims/models", "secrets/served"}}


def test_an_attempt_knows_nothing_of_the_monitoring():
    status = step(Status(), **SPEC)
    config_map, *_, head = desired_objects(make_job(status=status, **SPEC), status, SETTINGS)
    assert "monitoring" not in json.loads(config_map["data"]["job.json"])["spec"]
    assert "fresh" not in json.dumps(head)


def test_a_run_asks_for_workers_as_an_attempt_does_and_no_more_than_there_may_be():
    report = run_report(workers_wanted=9, message="measuring")
    status = step(begun(), make_pod(attempt=2), report=report, now=at(3 * HOUR + 30), **SPEC)
    assert status.monitoring.run.workers_wanted == 2
    assert status.workers_wanted == 0
    pods = [each for each in desired_objects(make_job(status=status, **SPEC), acting(status), SETTINGS) if each["kind"] == "Pod"]
    assert [pod["metadata"]["name"] for pod in pods] == ["bot-2-head", "bot-2-worker-0", "bot-2-worker-1"]


def test_what_held_is_told():
    status = ran(begun())
    assert condition(status, "Degraded") == ("False", Reason.QUALITY_HELD)
    monitoring = status.monitoring
    assert (monitoring.runs, monitoring.failed_runs, monitoring.failure) == (1, 0, None)
    assert monitoring.next_run_time == "2026-01-02T03:00:00Z"
    assert monitoring.last_run_time == "2026-01-01T03:01:00Z"
    assert [(each.metric, each.released, each.difference, each.verdict) for each in monitoring.results] == [
        ("task/loss", 1.0, 0.0, "Held"),
        ("task/f1", 0.8, 0.0, "Held"),
    ]
    assert not monitoring.run.running
    assert not desired_objects(make_job(status=status, **SPEC), acting(status), SETTINGS)


def test_a_degraded_model_is_told_and_stays_published():
    status = ran(begun(), fresh=figures(loss=1.5, f1=0.75))
    assert condition(status, "Degraded") == ("True", Reason.DEGRADED)
    assert status.condition("Degraded").message == "task/loss: 1.5 (1.4 to 1.6), released with 1"
    assert (status.phase, status.artifacts) == ("Complete", (ADAPTER,))
    assert condition(status, "Ready")[0] == "True"
    again = ran(step(status, now=at(DAY + 3 * HOUR), **SPEC), 3, at(DAY + 3 * HOUR + 60))
    assert condition(again, "Degraded") == ("False", Reason.QUALITY_HELD)


@pytest.mark.parametrize(
    ("metric", "value", "margin", "worse_by", "verdict"),
    [
        # released with 0.8, and the higher the better
        ("task/f1", 0.8, 0.1, 0.0, "Held"),
        ("task/f1", 0.75, 0.1, 0.0, "Inconclusive"),
        ("task/f1", 0.6, 0.1, 0.0, "Degraded"),
        ("task/f1", 0.6, 0.1, 0.25, "Held"),
        ("task/f1", 0.5, 0.1, 0.25, "Inconclusive"),
        ("task/f1", 0.4, 0.1, 0.25, "Degraded"),
        # released with 1, and the lower the better
        ("task/loss", 0.9, 0.1, 0.0, "Held"),
        ("task/loss", 1.05, 0.1, 0.0, "Inconclusive"),
        ("task/loss", 1.2, 0.1, 0.0, "Degraded"),
        ("task/loss", 1.2, 0.1, 0.2, "Held"),
        ("task/loss", 1.2, None, 0.0, "Inconclusive"),
    ],
)
def test_a_figure_is_degraded_where_its_whole_interval_is_worse(metric, value, margin, worse_by, verdict):
    plan = MonitoringPlan.model_validate({**NIGHTLY, "degradedIf": [{"metric": metric, "worseBy": worse_by}]}, strict=False)
    ends = {} if margin is None else {"low": value - margin, "high": value + margin}
    released = {"task/f1": 0.8, "task/loss": 1.0}[metric]
    assert judged(MonitoredResult(metric=metric, value=value, released=released, **ends), plan).verdict == verdict


def test_only_the_metrics_that_are_named_are_judged():
    plan = {**NIGHTLY, "degradedIf": [{"metric": "task/f1"}]}
    spec = {**SPEC, "monitoring": plan}
    report = run_report(outcome="Succeeded", fresh=figures(loss=9.0))
    status = step(begun(**spec), make_pod(attempt=2), report=report, now=at(3 * HOUR + 60), **spec)
    assert [each.verdict for each in status.monitoring.results] == [None, "Held"]
    assert condition(status, "Degraded") == ("False", Reason.QUALITY_HELD)
    # other bounds are held against the same figures, at once
    assert condition(step(status, now=at(4 * HOUR), **SPEC), "Degraded") == ("True", Reason.DEGRADED)


def test_a_tenants_figures_are_those_that_were_asked_for():
    strange = (FreshFigure(metric="other/f1", value=1.0), FreshFigure(metric="task/bleu", value=1.0), *figures(), *figures(f1=0.1))
    assert [(each.metric, each.value) for each in ran(begun(), fresh=strange).monitoring.results] == [("task/loss", 1.0), ("task/f1", 0.1)]
    nothing = ran(begun(), fresh=())
    assert nothing.monitoring.failure.reason == Reason.EVALUATION_FAILED


@pytest.mark.parametrize(
    ("pods", "reason"),
    [
        ((make_pod(attempt=2, phase="Failed", containerStatuses=terminated(137, "OOMKilled")),), Reason.OUT_OF_MEMORY),
        ((make_pod(attempt=2, phase="Failed", containerStatuses=terminated(137, "Error")),), Reason.HEAD_LOST),
        ((make_pod(attempt=2, phase="Failed", containerStatuses=terminated(143, "Error")),), Reason.PREEMPTED),
        ((), Reason.HEAD_LOST),
    ],
)
def test_a_run_that_fails_leaves_the_job_as_it_is_and_the_next_comes_on_schedule(pods, reason):
    seen = step(begun(), make_pod(attempt=2), now=at(3 * HOUR + 1), **SPEC)
    status = step(seen, *pods, now=at(3 * HOUR + 5), **SPEC)
    assert status.monitoring.failure.reason == reason
    assert status.monitoring.failed_runs == 1
    assert condition(status, "Degraded") == ("Unknown", reason)
    assert status.phase == "Complete"
    assert status.attempt.failures == 0
    assert status.failure is None
    assert status.monitoring.next_run_time == "2026-01-02T03:00:00Z"
    mended = ran(step(status, now=at(DAY + 3 * HOUR), **SPEC), 3, at(DAY + 3 * HOUR + 60))
    assert mended.monitoring.failure is None
    assert condition(mended, "Degraded") == ("False", Reason.QUALITY_HELD)


def test_pods_that_never_run_end_the_run():
    waiting = step(begun(), make_pod(attempt=2, phase="Pending"), now=at(3 * HOUR + 5), **SPEC)
    assert waiting.monitoring.run.running
    status = step(waiting, make_pod(attempt=2, phase="Pending"), now=at(3 * HOUR + 1800), **SPEC)
    assert status.monitoring.failure.reason == Reason.PRE_RUNNING_DEADLINE_EXCEEDED


def test_a_refusal_is_told_once():
    words = Waiting(Reason.FORBIDDEN, "exceeded quota")
    refused = step(begun(), now=at(3 * HOUR), refusal=words, **SPEC)
    assert refused.monitoring.message == "exceeded quota"
    assert step(refused, now=at(3 * HOUR + 10), **SPEC) == refused


def test_an_absent_operator_makes_up_for_one_run_only():
    status = step(complete(**SPEC), now=at(10 * DAY), **SPEC)
    assert status.monitoring.run.number == 2
    done = ran(status, now=at(10 * DAY + 60))
    assert done.monitoring.next_run_time == "2026-01-11T03:00:00Z"
    assert step(done, now=at(10 * DAY + 120), **SPEC) == done


def test_a_run_that_outlasts_the_next_time_is_followed_by_the_one_after():
    done = ran(begun(), now=at(2 * DAY))
    assert done.monitoring.next_run_time == "2026-01-03T03:00:00Z"


def test_suspending_stops_the_run_and_no_other_begins():
    spec = {**SPEC, "suspend": True}
    status = step(begun(), make_pod(attempt=2), now=at(3 * HOUR + 10), **spec)
    assert not status.monitoring.run.running
    assert (status.monitoring.failed_runs, status.monitoring.next_run_time, status.phase) == (0, None, "Complete")
    assert step(status, now=at(9 * DAY), **spec) == status
    resumed = step(status, now=at(9 * DAY), **SPEC)
    assert resumed.monitoring.next_run_time == "2026-01-10T03:00:00Z"


def test_a_budget_that_is_used_up_and_a_pause_let_no_run_begin():
    used = complete(**SPEC).model_copy(update={"usage": Usage(gpu_seconds=2 * HOUR)})
    limited = step(used, now=at(DAY), **SPEC, maxGpuHours=2)
    assert limited.monitoring.run is None
    assert "maxGpuHours (2) is used up" in limited.monitoring.message
    raised = step(limited, now=at(DAY), **SPEC, maxGpuHours=3)
    assert raised.monitoring.next_run_time == "2026-01-02T03:00:00Z"
    status = complete(**SPEC)
    paused = replace(make_job(status=status, **SPEC), annotations={ANNOTATION_RECONCILE: "disabled"})
    assert advance(paused, Observed(), SETTINGS, at(DAY)) == status


def test_another_schedule_counts_at_once_and_none_forgets_all():
    hourly = {**SPEC, "monitoring": {**NIGHTLY, "schedule": "30 * * * *"}}
    status = step(complete(**SPEC), now=at(60), **hourly)
    assert status.monitoring.next_run_time == "2026-01-01T00:30:00Z"
    without = {"evaluation": EVALUATION}
    running = step(begun(), make_pod(attempt=2), now=at(3 * HOUR + 10), **without)
    assert running.monitoring is None
    assert running.condition("Degraded") is None
    assert not desired_objects(make_job(status=running, **without), acting(running), SETTINGS)
    added = step(complete(**without), now=at(HOUR), **SPEC)
    assert added.monitoring.next_run_time == "2026-01-01T03:00:00Z"


def test_events_tell_when_it_changes_and_nothing_else():
    job = make_job(**SPEC)

    def told(before: Status, after: Status) -> list[tuple[str, str]]:
        return [(event.type, event.reason) for event in events_between(job, before, after)]

    start = complete(**SPEC)
    running = begun()
    assert told(start, running) == []
    worse = ran(running, fresh=figures(loss=2.0))
    assert told(running, worse) == [("Warning", "Degraded")]
    next_run = step(worse, now=at(DAY + 3 * HOUR), **SPEC)
    still = ran(next_run, 3, at(DAY + 3 * HOUR + 60), fresh=figures(loss=2.1))
    assert told(worse, next_run) == told(next_run, still) == []
    mended = ran(step(still, now=at(2 * DAY + 3 * HOUR), **SPEC), 4, at(2 * DAY + 3 * HOUR + 60))
    assert told(still, mended) == [("Normal", "QualityHeld")]
    failed = step(step(mended, now=at(3 * DAY + 3 * HOUR), **SPEC), make_pod(attempt=5, phase="Failed"), now=at(4 * DAY), **SPEC)
    assert told(mended, failed) == [("Warning", "InternalError")]


def test_a_run_costs_few_writes():
    """A status that changes is a write: begin, head seen to run, workers wanted, workers run, workers let go, end."""
    status, writes = begun(), 1
    head, workers = make_pod(attempt=2), (make_pod("worker", attempt=2, index=0), make_pod("worker", attempt=2, index=1))
    course = [((), None)] * 3 + [((make_pod(attempt=2, phase="Pending"),), None)] * 3 + [((head,), run_report(message="preparing"))] * 3
    course += [((head,), run_report(workers_wanted=2))] * 3 + [((head, *workers), run_report(workers_wanted=2, message="9 of 20"))] * 50
    course += [((head, *workers), run_report())] * 3 + [((head,), run_report(outcome="Succeeded", fresh=figures()))] * 3
    for second, (pods, report) in enumerate(course):
        after = advance(
            make_job(status=status, **SPEC),
            Observed(tuple(pods), frozenset({2}), report),
            SETTINGS,
            at(3 * HOUR) + timedelta(seconds=second),
        )
        writes += after != status
        status = after
    assert writes == 7
    assert condition(status, "Degraded") == ("False", Reason.QUALITY_HELD)


def test_many_figures_fit_into_a_termination_message():
    many = tuple(FreshFigure(metric=f"suite-{n}/embeddingSimilarity", value=n / 7, low=n / 9, high=n / 3, n=12345) for n in range(240))
    text = termination_message(run_report(outcome="Succeeded", fresh=many, message="x" * 900))
    assert len(text.encode()) <= 4096
    found = parse_report(text)
    assert found is not None
    assert len(found.fresh) == 32
    assert found.fresh[1].value == 0.142857
