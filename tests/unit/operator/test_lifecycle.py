"""What a status becomes: a table for each check, and what holds for all of them."""

from dataclasses import replace

import pytest
from tests.builders import SETTINGS, T0, at, make_job, make_pod, make_report, stages, terminated
from tests.unit.operator.looks import BEGUN, HEAD, PENDING_HEAD, PREPARING, TRAINING, WORKERS, condition, ended, step

from finetune_api.reasons import Reason
from finetune_api.status import (
    Artifact,
    BestCheckpoint,
    CheckpointRef,
    Checkpoints,
    DataSummary,
    Metric,
    ModelSummary,
    Progress,
    Resolved,
    Status,
    Usage,
)
from finetune_operator.lifecycle import advance
from finetune_operator.observed import Observed, Waiting
from finetune_operator.times import rfc3339

# The way of a job that goes well.


def test_a_new_job_begins_its_first_attempt_before_any_pod_exists() -> None:
    assert (BEGUN.phase, BEGUN.observed_generation, BEGUN.start_time) == ("Pending", 1, "2026-01-01T00:00:00Z")
    assert (BEGUN.attempt.number, BEGUN.attempt.running, BEGUN.attempt.head_seen) == (1, True, False)
    assert BEGUN.resolved == Resolved(trainer_image="registry.example/trainer:1")
    assert len(BEGUN.conditions) == 12
    assert condition(BEGUN, "Accepted") == ("True", "Accepted")
    assert condition(BEGUN, "Reconciling") == ("True", "Pending")


@pytest.mark.parametrize(
    ("stage", "phase", "reason", "wanted"),
    [
        ("Prepare", "Preparing", "Preparing", 0),
        ("Train", "Training", "Training", 2),
        ("Evaluate", "Evaluating", "Evaluating", 2),
        ("Publish", "Publishing", "Publishing", 0),
    ],
)
def test_the_phase_follows_the_stage(stage, phase, reason, wanted) -> None:
    status = step(BEGUN, HEAD, *WORKERS, report=make_report(stage), now=at(10))
    assert (status.phase, status.message, status.workers_wanted) == (phase, f"in {stage}", wanted)
    assert condition(status, "Ready") == ("False", reason)


def test_what_the_trainer_says_is_the_status() -> None:
    said = {
        "warnings": ("90 examples are few for full tuning",),
        "model": ModelSummary(parameters=1000, trained_parameters=10),
        "data": DataSummary(train=90, validation=10),
        "metrics": (Metric(name="train/loss", value=1.5, step=5),),
        "checkpoints": Checkpoints(
            latest=CheckpointRef(step=4, uri="pvc://models/bot/4"),
            best=BestCheckpoint(step=2, uri="pvc://models/bot/2", metric="validation/loss", value=1.25),
        ),
        "artifacts": (Artifact(kind="adapter", uri="pvc://models/bot/adapter", digest="sha256:0", bytes=1),),
        "usage": Usage(trained_tokens=1000),
    }
    status = step(BEGUN, HEAD, *WORKERS, report=make_report("Train", resolved=Resolved(model_revision="abc", trainer_image="evil"), **said))
    assert {name: getattr(status, name) for name in said} == said
    assert status.resolved == Resolved(model_revision="abc", trainer_image="registry.example/trainer:1")


def test_a_report_that_leaves_something_out_takes_nothing_back() -> None:
    said = {
        "metrics": (Metric(name="train/loss", value=1.5),),
        "data": DataSummary(train=90),
        "model": ModelSummary(parameters=1000, trained_parameters=10),
        "warnings": ("the micro-batch was halved",),
    }
    before = step(BEGUN, HEAD, *WORKERS, report=make_report(**said))
    status = step(before, HEAD, *WORKERS, report=make_report("Publish"), now=at(60))
    assert {name: getattr(status, name) for name in said} == said


@pytest.mark.parametrize("wrong", [{"job_uid": "another"}, {"attempt": 2}], ids=["another job", "another attempt"])
def test_a_report_of_something_else_is_ignored(wrong) -> None:
    assert step(PREPARING, HEAD, report=make_report("Train", **wrong)) == PREPARING


def test_a_tenants_pod_gets_no_more_workers_than_the_spec_says() -> None:
    assert step(BEGUN, HEAD, report=make_report("Train", workers_wanted=500)).workers_wanted == 2


@pytest.mark.parametrize("left", ["live", "in the termination message"])
def test_success_completes_the_job_however_it_is_learned(left) -> None:
    report = make_report("Publish", outcome="Succeeded", stages=stages("Publish", ended=True), message="published")
    if left == "live":
        status = step(TRAINING, HEAD, report=report, now=at(60))
    else:
        status = step(TRAINING, ended(0, "Completed", report.model_dump_json(by_alias=True)), now=at(60))
    assert (status.phase, status.message, status.completion_time) == ("Complete", "published", "2026-01-01T00:01:00Z")
    assert (status.workers_wanted, status.workers_ready, status.attempt.running) == (0, 0, False)
    for kind in ("DataReady", "Trained", "Evaluated", "Published", "Complete", "Ready"):
        assert condition(status, kind) == ("True", "Succeeded")
    assert condition(status, "Reconciling")[0] == condition(status, "Stalled")[0] == "False"


def test_an_ended_job_stays_as_it_is_but_sees_that_its_user_changed_it() -> None:
    done = step(TRAINING, HEAD, report=make_report("Publish", outcome="Succeeded"))
    job = replace(make_job(status=done, suspend=True, activeDeadlineSeconds=1), generation=7)
    status = advance(job, Observed(), SETTINGS, at(1e6))
    assert status.observed_generation == 7
    assert {each.observed_generation for each in status.conditions} == {7}
    conditions = tuple(each.model_copy(update={"observed_generation": 1}) for each in status.conditions)
    assert status.model_copy(update={"observed_generation": 1, "conditions": conditions}) == done


def test_a_job_that_is_being_deleted_is_left_as_it_is() -> None:
    job = replace(make_job(status=TRAINING, suspend=True), deleting=True)
    assert advance(job, Observed(), SETTINGS, at(1e6)) == TRAINING


def test_a_spec_that_cannot_be_understood_fails_the_job() -> None:
    job = replace(make_job(status=TRAINING), spec=None, problem="spec.method.lora.rank: Input should be a valid integer")
    status = advance(job, Observed((HEAD,)), SETTINGS, at(5))
    assert (status.phase, status.message) == ("Failed", job.problem)
    assert status.failure is not None
    assert (status.failure.reason, status.failure.retryable) == ("InvalidSpec", False)
    assert condition(status, "Accepted") == ("False", "InvalidSpec")
    assert condition(status, "Stalled") == ("True", "InvalidSpec")


# Conditions.


def test_a_conditions_time_moves_only_with_its_status() -> None:
    preparing = step(BEGUN, HEAD, report=make_report("Prepare"), now=at(5))
    done = step(preparing, HEAD, report=make_report("Publish", outcome="Succeeded"), now=at(60))
    times = {kind: [status.condition(kind).last_transition_time for status in (BEGUN, preparing, done)] for kind in ("Ready", "Accepted")}
    assert times == {"Ready": [rfc3339(T0), rfc3339(T0), rfc3339(at(60))], "Accepted": [rfc3339(T0)] * 3}


def test_messages_are_cut_to_what_the_schema_takes() -> None:
    words = Waiting(Reason.FORBIDDEN, "x" * 5000)
    status = step(BEGUN, refusal=words)
    assert len(status.message or "") == 1024
    Status.model_validate(status.to_json())


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        (0, ("False", "Pending", "0 of 4 workers run")),
        (1, ("False", "Pending", "1 of 4 workers run")),
        (2, ("True", "Training", "2 of 4 workers run")),
    ],
)
def test_workers_are_ready_when_as_many_run_as_the_training_needs(running, expected) -> None:
    workers = [make_pod("worker", index=index, phase="Running" if index < running else "Pending") for index in range(4)]
    status = step(PREPARING, HEAD, *workers, report=make_report(workers_wanted=4), compute={"workers": {"min": 2, "max": 4}})
    ready = status.condition("WorkersReady")
    assert ready is not None
    assert (ready.status, ready.reason, ready.message) == expected
    assert status.workers_ready == running


def test_lost_workers_do_not_end_the_attempt() -> None:
    status = step(TRAINING, HEAD, WORKERS[0], report=make_report(), now=at(5))
    assert (status.attempt.number, status.attempt.running, status.phase) == (1, True, "Training")
    assert condition(status, "WorkersReady") == ("False", "WorkersLost")
    assert condition(step(status, HEAD, *WORKERS, report=make_report(), now=at(9)), "WorkersReady") == ("True", "Training")


@pytest.mark.parametrize(
    ("ended_worker", "reason", "words"),
    [
        (make_pod("worker", phase="Failed", containerStatuses=terminated(137, "OOMKilled")), "OOMKilled", "OOMKilled, exit code 137"),
        (make_pod("worker", phase="Failed", containerStatuses=terminated(1)), "WorkersLost", "Error, exit code 1"),
        (make_pod("worker", phase="Failed", reason="Evicted", message="low on memory"), "WorkersLost", "Evicted: low on memory"),
    ],
    ids=["out of memory", "failed", "evicted"],
)
def test_why_a_worker_ended_is_said_before_it_is_replaced(ended_worker, reason, words) -> None:
    status = step(TRAINING, HEAD, ended_worker, WORKERS[1], report=make_report(), now=at(60))
    assert condition(status, "WorkersReady") == ("False", reason)
    assert status.message == f"pod bot-1-worker-0 ended ({words}) and is made anew"
    assert status.attempt.running


def test_pods_that_a_queue_holds_make_the_job_queued_and_no_deadline_counts() -> None:
    gate = [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]
    held = make_pod(phase="Pending", conditions=gate)
    status = step(BEGUN, held, now=at(1e6))
    assert (status.phase, status.attempt.waiting_time) == ("Queued", None)
    admitted = step(status, PENDING_HEAD, now=at(2e6))
    assert (admitted.phase, admitted.attempt.waiting_time) == ("Pending", rfc3339(at(2e6)))


# Waiting for pods.

_WAITING = {
    "an image": (Waiting(Reason.IMAGE_PULL_FAILED, "pod bot-1-head: not found"), "ImagePullFailed"),
    "a secret": (Waiting(Reason.SECRET_NOT_FOUND, 'pod bot-1-head: secret "hub" not found'), "SecretNotFound"),
    "a config map": (Waiting(Reason.CONFIG_MAP_NOT_FOUND, 'pod bot-1-head: configmap "data" not found'), "ConfigMapNotFound"),
    "a claim": (Waiting(Reason.VOLUME_CLAIM_NOT_FOUND, 'pod bot-1-head: persistentvolumeclaim "x" not found'), "VolumeClaimNotFound"),
    "a node": (Waiting(Reason.UNSCHEDULABLE, "pod bot-1-head: 0/3 nodes are available: Insufficient cpu"), "PreRunningDeadlineExceeded"),
    "storage": (Waiting(Reason.STORAGE_UNAVAILABLE, "pod bot-1-head: attach failed"), "StorageUnavailable"),
}


@pytest.mark.parametrize(("waiting", "failed_as"), _WAITING.values(), ids=_WAITING)
def test_what_a_pod_waits_for_is_said_at_once_and_fails_the_job_in_the_end(waiting, failed_as) -> None:
    head = replace(PENDING_HEAD, waiting=waiting)
    status = step(BEGUN, head, now=at(5))
    assert (status.phase, status.message) == ("Pending", waiting.message)
    assert condition(status, "Reconciling") == ("True", waiting.reason)
    assert condition(status, "Ready") == ("False", waiting.reason)

    assert step(status, head, now=at(1799)).phase == "Pending"
    late = step(status, head, now=at(1800))
    assert late.phase == "Failed"
    assert condition(late, "Failed") == ("True", failed_as)
    assert late.failure is not None
    assert (late.failure.reason, late.failure.retryable) == (failed_as, False)
    assert waiting.message in late.failure.message


def test_the_wait_for_workers_begins_when_they_are_wanted() -> None:
    preparing = step(BEGUN, HEAD, report=make_report("Prepare"), now=at(5000))
    assert preparing.attempt.waiting_time is None
    wanting = step(preparing, HEAD, WORKERS[0], report=make_report(), now=at(6000))
    assert wanting.attempt.waiting_time == rfc3339(at(6000))
    assert step(wanting, HEAD, WORKERS[0], report=make_report(), now=at(7799)).phase == "Training"
    late = step(wanting, HEAD, WORKERS[0], report=make_report(), now=at(7800))
    assert condition(late, "Failed") == ("True", "PreRunningDeadlineExceeded")


def test_an_operator_that_was_away_blames_nothing_on_the_time_it_did_not_see() -> None:
    starting = step(BEGUN, PENDING_HEAD, now=at(5))
    assert starting.attempt.waiting_time == rfc3339(T0)
    # Meanwhile the head has started, and wants workers: their time begins now.
    wanting = step(starting, HEAD, report=make_report(), now=at(5000))
    assert (wanting.phase, wanting.attempt.waiting_time) == ("Training", rfc3339(at(5000)))
    # Or it has failed: that is the reason, and not that it once waited.
    failed = step(starting, ended(137, "OOMKilled"), now=at(5000))
    assert (failed.phase, failed.failure.reason, failed.attempt.failures) == ("Pending", "OOMKilled", 1)


def test_a_refusal_is_said_until_what_was_refused_exists() -> None:
    quota = Waiting(Reason.FORBIDDEN, "exceeded quota: gpus")
    refused = step(BEGUN, refusal=quota)
    assert condition(refused, "Reconciling") == ("True", "Forbidden")
    assert step(refused, now=at(10)) == refused
    assert condition(step(refused, PENDING_HEAD, now=at(20)), "Reconciling") == ("True", "Pending")


def test_an_elastic_job_does_without_workers_that_are_refused() -> None:
    elastic = {"compute": {"workers": {"min": 1, "max": 2}}}
    training = step(PREPARING, HEAD, WORKERS[0], report=make_report(), **elastic)
    assert condition(training, "WorkersReady") == ("True", "Training")
    refused = step(training, HEAD, WORKERS[0], report=make_report(), refusal=Waiting(Reason.FORBIDDEN, "quota"), now=at(5), **elastic)
    assert refused == training


# How often progress is written.


def test_progress_alone_is_written_at_most_every_poll() -> None:
    def progress(number: int, **given):
        return make_report(message=f"step {number}", progress=Progress(step=number, total_steps=100, percent=number), **given)

    status = step(TRAINING, HEAD, *WORKERS, report=progress(6), now=at(10))
    assert step(status, HEAD, *WORKERS, report=progress(7), now=at(19)) == status
    later = step(status, HEAD, *WORKERS, report=progress(7), now=at(20))
    assert (later.progress.step, later.progress.last_update_time, later.message) == (7, rfc3339(at(20)), "step 7")
    # The trainer's clock is not asked: it may be wrong.
    skewed = make_report(progress=Progress(step=8, last_update_time="2040-01-01T00:00:00Z"))
    assert step(later, HEAD, *WORKERS, report=skewed, now=at(30)).progress.step == 8
    # A change of state does not wait.
    assert step(later, HEAD, *WORKERS, report=make_report("Publish"), now=at(21)).phase == "Publishing"
    assert step(later, HEAD, WORKERS[0], report=progress(9), now=at(21)).workers_ready == 1


def test_progress_that_stands_still_is_not_written() -> None:
    assert (
        step(TRAINING, HEAD, *WORKERS, report=make_report(progress=Progress(step=5, total_steps=10, percent=50)), now=at(1000)) == TRAINING
    )
