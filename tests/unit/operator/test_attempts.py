"""How attempts end and the next begin: failures, preemptions, suspension, deadlines."""

from dataclasses import replace
from datetime import datetime

from tests.builders import SETTINGS, T0, at, make_job, make_pod, make_report
from tests.unit.operator.looks import BEGUN, HEAD, PREPARING, TRAINING, WORKERS, condition, ended, step

from finetune_api.status import (
    Attempt,
    Failure,
    Resolved,
    Status,
    Usage,
)
from finetune_operator.lifecycle import advance
from finetune_operator.observed import Observed
from finetune_operator.times import rfc3339

# The head ends.


def test_a_failure_is_tried_again_after_a_wait_that_doubles() -> None:
    status, waits = TRAINING, []
    for number in (1, 2, 3):
        status = step(status, ended(attempt=number), now=at(1000 * number), backoffLimit=10)
        assert status.attempt.retry_time is not None
        waits.append((datetime.fromisoformat(status.attempt.retry_time) - at(1000 * number)).total_seconds())
        assert (status.phase, status.attempt.failures) == ("Pending", number)
        status = step(status, now=at(1000 * number + waits[-1]))
        assert (status.attempt.number, status.attempt.running) == (number + 1, True)
        status = step(status, make_pod(attempt=number + 1), now=at(1000 * number + waits[-1] + 1))
    assert waits == [10, 20, 40]


def test_the_wait_between_attempts_is_bounded() -> None:
    before = TRAINING.model_copy(update={"attempt": TRAINING.attempt.model_copy(update={"failures": 60})})
    status = step(before, ended(), now=T0, backoffLimit=100)
    assert status.attempt.retry_time == rfc3339(at(360))


def test_the_last_failure_the_user_allows_ends_the_job() -> None:
    status = step(TRAINING, ended(139, message="core dumped"), backoffLimit=0)
    assert condition(status, "Failed") == ("True", "BackoffLimitExceeded")
    assert condition(status, "Stalled") == ("True", "BackoffLimitExceeded")
    assert status.failure is not None
    assert (status.failure.reason, status.failure.stage, status.failure.exit_code) == ("ProcessCrashed", "Train", 139)
    assert status.attempt.failures == 1
    assert [stage.state for stage in status.stages] == ["Succeeded", "Failed"]
    assert condition(status, "Trained") == ("False", "ProcessCrashed")
    assert condition(status, "DataReady") == ("True", "Succeeded")


def test_a_failure_that_another_attempt_cannot_help_ends_the_job() -> None:
    why = Failure(stage="Prepare", reason="DatasetInvalid", message="train.jsonl:7: no field `prompt`", retryable=False)
    head = ended(1, message=make_report("Prepare", outcome="Failed", failure=why).model_dump_json(by_alias=True))
    status = step(PREPARING, head)
    assert (status.phase, status.message) == ("Failed", "train.jsonl:7: no field `prompt`")
    assert condition(status, "DataReady") == ("False", "DatasetInvalid")
    assert status.failure is not None
    assert (status.failure.pod, status.failure.hint is not None) == ("bot-1-head", True)


def test_a_preemption_is_no_failure_and_is_made_good_at_once() -> None:
    before = TRAINING.model_copy(update={"attempt": TRAINING.attempt.model_copy(update={"start_time": rfc3339(T0)})})
    status = step(before, ended(143, disruption=None, reason="Evicted", message="node drained"), now=at(600), backoffLimit=0)
    assert (status.attempt.number, status.attempt.preemptions, status.attempt.failures) == (2, 1, 0)
    assert (status.attempt.end_reason, status.failure) == ("Preempted", None)


def test_an_attempt_that_is_taken_away_at_once_is_not_replaced_at_once() -> None:
    status = step(TRAINING, ended(143), now=at(3))
    assert (status.attempt.number, status.attempt.running, status.attempt.retry_time) == (1, False, rfc3339(at(10)))


def test_a_head_that_was_seen_and_is_gone_is_lost() -> None:
    status = step(TRAINING, now=at(600))
    assert (status.attempt.number, status.attempt.preemptions, status.attempt.end_reason) == (2, 1, "HeadLost")


def test_a_head_that_was_never_seen_is_only_not_there_yet() -> None:
    assert step(BEGUN, now=at(600)).attempt == BEGUN.attempt


def test_the_next_attempt_waits_until_the_pods_of_the_one_before_have_gone() -> None:
    status = step(TRAINING, *WORKERS, now=at(600))
    assert (status.attempt.number, status.attempt.running, status.attempt.preemptions) == (1, False, 1)
    assert step(status, now=at(601)).attempt.number == 2


def test_a_job_keeps_the_trainer_that_it_began_with() -> None:
    job = make_job(status=TRAINING)
    settings = replace(SETTINGS, trainer_image="registry.example/trainer:2")
    assert advance(job, Observed(), settings, at(600)).resolved == Resolved(trainer_image="registry.example/trainer:1")


def test_sums_of_what_a_head_claims_stay_within_what_a_status_may_hold() -> None:
    most = 2**53 - 1
    claim = {"usage": Usage(gpu_seconds=1.7e308, trained_tokens=most), "lost_steps": most}
    status = step(TRAINING, HEAD, report=make_report(**claim))
    status = status.model_copy(update={"earlier_usage": status.usage})
    status = status.model_copy(update={"attempt": status.attempt.model_copy(update={"earlier_lost_steps": most})})
    status = step(status, HEAD, report=make_report(**claim))
    assert (status.usage, status.attempt.lost_steps) == (Usage(trained_tokens=most), most)
    assert Status.model_validate(status.to_json()) == status, "what was written can be read"


def test_usage_and_lost_steps_are_summed_over_attempts_and_each_counted_once() -> None:
    status = TRAINING
    for seconds, used in ((20, 10), (40, 25), (60, 25)):
        report = make_report(usage=Usage(gpu_seconds=used, trained_tokens=100 * used), lost_steps=2)
        status = step(status, HEAD, *WORKERS, report=report, now=at(seconds))
    assert (status.usage, status.attempt.lost_steps) == (Usage(trained_tokens=2500), 2)
    second = step(step(status, now=at(600)), make_pod(attempt=2), now=at(610))
    assert second.usage == status.usage
    for seconds in (620, 640):
        report = make_report(attempt=2, usage=Usage(gpu_seconds=5, trained_tokens=500), lost_steps=3, workers_wanted=0)
        second = step(second, make_pod(attempt=2), report=report, now=at(seconds))
    assert (second.usage, second.attempt.lost_steps) == (Usage(trained_tokens=3000), 5)


# Suspension and deadlines.


def test_suspending_takes_the_pods_away_first() -> None:
    stopping = step(TRAINING, HEAD, *WORKERS, report=make_report(), now=at(100), suspend=True)
    assert (stopping.attempt.running, stopping.phase) == (False, "Training")
    assert condition(stopping, "Suspended") == ("False", "Suspended")
    suspended = step(stopping, now=at(130), suspend=True)
    assert (suspended.phase, suspended.suspended_time) == ("Suspended", rfc3339(at(130)))
    assert condition(suspended, "Suspended") == ("True", "Suspended")
    assert condition(suspended, "Reconciling")[0] == condition(suspended, "Stalled")[0] == "False"


def test_workers_that_stop_for_a_suspension_are_not_lost() -> None:
    stopping = step(TRAINING, HEAD, *WORKERS, report=make_report(), now=at(100), suspend=True)
    assert (stopping.workers_wanted, condition(stopping, "WorkersReady")) == (0, ("Unknown", "Pending"))
    assert step(stopping, HEAD, *WORKERS, report=make_report(), now=at(101), suspend=True) == stopping


def test_a_job_may_be_suspended_from_the_start() -> None:
    status = step(Status(), suspend=True)
    assert (status.phase, status.attempt) == ("Suspended", Attempt())
    assert step(status, now=at(50)).attempt.number == 1


def test_resuming_is_a_new_attempt_and_neither_a_failure_nor_a_preemption() -> None:
    suspended = step(step(TRAINING, HEAD, now=at(100), suspend=True), now=at(130), suspend=True)
    status = step(suspended, now=at(1130))
    assert (status.attempt.number, status.attempt.failures, status.attempt.preemptions) == (2, 0, 0)
    assert (status.suspended_time, status.suspended_seconds) == (None, 1000)


def test_a_suspension_that_is_taken_back_while_pods_stop_is_no_preemption() -> None:
    stopping = step(TRAINING, HEAD, now=at(100), suspend=True)
    assert step(stopping, HEAD, now=at(101)).attempt.running is False
    status = step(stopping, now=at(130))
    assert (status.attempt.number, status.attempt.failures, status.attempt.preemptions) == (2, 0, 0)


def test_success_while_suspending_counts() -> None:
    stopping = step(TRAINING, HEAD, now=at(100), suspend=True)
    assert step(stopping, HEAD, report=make_report("Publish", outcome="Succeeded"), now=at(101), suspend=True).phase == "Complete"


def test_the_active_deadline_does_not_count_suspended_time() -> None:
    resumed = step(step(step(TRAINING, HEAD, now=at(100), suspend=True), now=at(100), suspend=True), now=at(1100))
    assert resumed.suspended_seconds == 1000
    head = make_pod(attempt=2)
    assert step(resumed, head, now=at(1599), activeDeadlineSeconds=600).phase == "Pending"
    late = step(resumed, head, now=at(1600), activeDeadlineSeconds=600)
    assert condition(late, "Failed") == ("True", "DeadlineExceeded")
    assert late.attempt.running is False


def test_the_active_deadline_counts_over_attempts_and_waits() -> None:
    waiting = step(TRAINING, ended(), now=at(595), activeDeadlineSeconds=600)
    assert waiting.phase == "Pending"
    assert condition(step(waiting, ended(), now=at(600), activeDeadlineSeconds=600), "Failed") == ("True", "DeadlineExceeded")
