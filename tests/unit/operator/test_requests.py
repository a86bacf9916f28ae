"""What people ask by annotations: a retry, the end, to be left alone."""

from dataclasses import replace
from datetime import datetime
from typing import Any

from tests.builders import SETTINGS, T0, Clock, at, make_job, make_report, raw_job
from tests.fakes import KEY, FakeCluster, FakeKubelet, drive
from tests.unit.operator.looks import BEGUN, HEAD, TRAINING, WORKERS, condition, ended

from finetune_api.reasons import Reason
from finetune_api.status import Failure, Status
from finetune_operator.lifecycle import advance
from finetune_operator.observed import Observed, Pod
from finetune_operator.reconcile import reconcile
from finetune_operator.times import rfc3339

RETRY, CANCEL, RECONCILE = "finetune.dev/retry", "finetune.dev/cancel", "finetune.dev/reconcile"


def look(before: Status, *pods: Pod, annotations: dict[str, str], report: Any = None, now: datetime = T0, **spec: Any) -> Status:
    """The status after one look at a job with annotations; a second look at the same changes nothing."""
    observed = Observed(tuple(pods), frozenset({1}), report)
    job = make_job(status=before, annotations=annotations, **spec)
    after = advance(job, observed, SETTINGS, now)
    assert advance(replace(job, status=after), observed, SETTINGS, now) == after
    return after


def failed(**spec: Any) -> Status:
    """The job after an attempt that was its last."""
    status = look(TRAINING, ended(139), annotations={}, backoffLimit=0, now=at(60), **spec)
    assert condition(status, "Failed") == ("True", "BackoffLimitExceeded")
    return status


# Retry.


def test_a_new_value_has_a_failed_job_tried_again() -> None:
    status = look(failed(), ended(139), annotations={RETRY: "1"}, backoffLimit=0, now=at(100))
    assert (status.attempt.number, status.attempt.running, status.attempt.failures) == (2, True, 1)
    assert (status.phase, status.completion_time, status.failure, status.retry_seen) == ("Pending", None, None, "1")
    assert condition(status, "Failed")[0] == condition(status, "Stalled")[0] == "False"
    assert condition(status, "Reconciling")[0] == "True"


def test_a_value_that_was_seen_does_nothing() -> None:
    status = look(failed(), annotations={RETRY: "1"}, backoffLimit=0, now=at(100))
    again = look(status, ended(139, attempt=2), annotations={RETRY: "1"}, backoffLimit=0, now=at(200))
    again = look(
        again.model_copy(update={"attempt": again.attempt.model_copy(update={"head_seen": True})}),
        annotations={RETRY: "1"},
        backoffLimit=0,
        now=at(300),
    )
    assert (again.phase, again.attempt.number) == ("Failed", 2)
    third = look(again, annotations={RETRY: "2"}, backoffLimit=0, now=at(400))
    assert (third.attempt.number, third.attempt.failures, third.retry_seen) == (3, 2, "2")


def test_a_value_from_before_the_failure_is_no_retry_of_it() -> None:
    running = look(TRAINING, HEAD, annotations={RETRY: "a"}, backoffLimit=0, now=at(10))
    status = look(running, ended(139), annotations={RETRY: "a"}, backoffLimit=0, now=at(60))
    assert (running.retry_seen, status.phase) == ("a", "Failed")


def test_a_retry_has_the_whole_budget_again() -> None:
    status = look(TRAINING, ended(), annotations={}, now=at(1000), backoffLimit=1)
    status = look(status, annotations={}, now=at(1020), backoffLimit=1)
    status = look(status, ended(attempt=2), annotations={}, now=at(1030), backoffLimit=1)
    assert (condition(status, "Failed")[1], status.attempt.failures) == ("BackoffLimitExceeded", 2)
    asked = {RETRY: "x"}
    status = look(status, annotations=asked, now=at(2000), backoffLimit=1)
    status = look(status, ended(attempt=3), annotations=asked, now=at(2010), backoffLimit=1)
    assert (status.phase, status.attempt.failures) == ("Pending", 3)
    assert status.attempt.retry_time == rfc3339(at(2020)), "the wait is that of a first failure"
    status = look(status, annotations=asked, now=at(2020), backoffLimit=1)
    status = look(status, ended(attempt=4), annotations=asked, now=at(2030), backoffLimit=1)
    assert condition(status, "Failed") == ("True", "BackoffLimitExceeded")
    assert "attempt 4 was the last of 2 that failed" in (status.message or "")


def test_time_between_the_failure_and_the_retry_is_not_counted_by_the_deadline() -> None:
    status = look(failed(), annotations={RETRY: "1"}, now=at(1060), activeDeadlineSeconds=600)
    assert (status.suspended_seconds, status.phase) == (1000, "Pending")
    assert look(status, HEAD, annotations={RETRY: "1"}, now=at(1599), activeDeadlineSeconds=600).phase == "Pending"
    late = look(status, HEAD, annotations={RETRY: "1"}, now=at(1600), activeDeadlineSeconds=600)
    assert condition(late, "Failed") == ("True", "DeadlineExceeded")


def test_the_retry_waits_for_the_pods_of_the_attempt_before() -> None:
    late = look(TRAINING, HEAD, *WORKERS, annotations={}, now=at(600), activeDeadlineSeconds=600)
    assert late.phase == "Failed"
    status = look(late, HEAD, annotations={RETRY: "1"}, now=at(610), activeDeadlineSeconds=6000)
    assert (status.phase, status.attempt.number, status.attempt.running) == ("Pending", 1, False)
    assert "DeadlineExceeded" in (status.message or "")
    assert look(status, annotations={RETRY: "1"}, now=at(611), activeDeadlineSeconds=6000).attempt.number == 2


def test_a_complete_job_is_not_retried() -> None:
    done = look(TRAINING, HEAD, report=make_report("Publish", outcome="Succeeded"), annotations={})
    assert look(done, annotations={RETRY: "1"}, now=at(10)) == done


def test_a_value_of_any_length_is_kept_in_64_characters() -> None:
    status = look(failed(), annotations={RETRY: "x" * 100_000}, now=at(100))
    # sha256 of 100,000 times x, by sha256sum.
    assert status.retry_seen == "d69e68988157833272305aaf21f453c800346e8a3640db6578e260215542e5d4"
    assert (status.attempt.number, Status.model_validate(status.to_json())) == (2, status)


# Cancel.


def test_a_canceled_job_fails_when_its_pods_have_gone() -> None:
    asked = {CANCEL: "true"}
    stopping = look(TRAINING, HEAD, *WORKERS, report=make_report(), annotations=asked, now=at(60))
    assert (stopping.phase, stopping.attempt.running, stopping.workers_wanted) == ("Training", False, 0)
    assert condition(stopping, "Failed")[0] == "False"
    assert look(stopping, HEAD, *WORKERS, report=make_report(), annotations=asked, now=at(61)) == stopping
    status = look(stopping, annotations=asked, now=at(90))
    assert condition(status, "Failed") == ("True", "Canceled")
    assert status.failure is not None
    assert (status.failure.reason, status.failure.retryable, status.attempt.failures) == ("Canceled", False, 0)
    assert status.completion_time == rfc3339(at(90))


def test_success_while_canceling_counts() -> None:
    stopping = look(TRAINING, HEAD, annotations={CANCEL: "true"}, now=at(60))
    done = look(stopping, HEAD, report=make_report("Publish", outcome="Succeeded"), annotations={CANCEL: "true"}, now=at(61))
    assert done.phase == "Complete"


def test_only_true_cancels() -> None:
    assert look(BEGUN, HEAD, annotations={CANCEL: "false"}).attempt.running


def test_a_job_may_be_canceled_before_it_began_and_while_it_is_suspended() -> None:
    assert condition(look(Status(), annotations={CANCEL: "true"}), "Failed") == ("True", "Canceled")
    suspended = look(look(TRAINING, annotations={}, suspend=True, now=at(10)), annotations={}, suspend=True, now=at(20))
    assert suspended.phase == "Suspended"
    status = look(suspended, annotations={CANCEL: "true"}, suspend=True, now=at(120))
    assert (condition(status, "Failed"), status.suspended_time, status.suspended_seconds) == (("True", "Canceled"), None, 110)


def test_a_canceled_job_is_revived_once_the_annotation_has_gone() -> None:
    status = look(TRAINING, annotations={CANCEL: "true"}, now=at(60))
    assert status.phase == "Failed"
    assert look(status, annotations={CANCEL: "true", RETRY: "1"}, now=at(70)) == status, "it is still given up"
    again = look(status, annotations={RETRY: "1"}, now=at(80))
    assert (again.attempt.number, again.attempt.running, again.attempt.failures) == (2, True, 0)


# Paused.


def test_a_paused_job_stays_as_it_is_and_says_so() -> None:
    asked = {RECONCILE: "disabled"}
    status = look(TRAINING, ended(), annotations=asked, now=at(600), activeDeadlineSeconds=60)
    assert (status.phase, status.attempt) == (TRAINING.phase, TRAINING.attempt)
    assert condition(status, "Reconciling") == ("True", "Paused")
    assert condition(status, "Ready") == ("False", "Paused")
    again = look(status, ended(), annotations={}, now=at(601))
    assert (again.attempt.failures, condition(again, "Ready")[1]) == (1, "Retrying")


def test_an_ended_job_is_not_revived_while_it_is_paused() -> None:
    before = failed()
    assert look(before, annotations={RETRY: "1", RECONCILE: "disabled"}, now=at(100)) == before
    assert look(before, annotations={RETRY: "1"}, now=at(100)).attempt.number == 2


async def test_nothing_is_made_or_deleted_while_a_job_is_paused() -> None:
    cluster = FakeCluster(Clock(), raw_job(ttlSecondsAfterFinished=0))
    kubelet = FakeKubelet(cluster)
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1])
    cluster.annotate(**{RECONCILE: "disabled"})
    cluster.writes.clear()
    for _ in range(20):
        assert await reconcile(KEY, cluster, SETTINGS, cluster.clock.now) is None
        kubelet.step()
        cluster.clock.advance(60)
    assert cluster.writes == ["patch status"]
    assert [event.reason for event in cluster.events.values()].count(Reason.PAUSED) == 1
    assert kubelet.trained == [1, 2, 3, 4], "the pods go on"
    cluster.annotate(**{RECONCILE: ""})
    await drive(cluster, kubelet)
    assert cluster.job is None, "it has ended, and its time to live too"


async def test_a_retried_job_goes_on_from_its_checkpoint() -> None:
    cluster = FakeCluster(Clock(), raw_job(backoffLimit=0))
    kubelet = FakeKubelet(cluster, script={1: Failure(stage="Train", reason="StorageFull", message="full", retryable=True)}, saved=2)
    await drive(cluster, kubelet)
    assert (cluster.status.phase, kubelet.trained) == ("Failed", [])
    cluster.annotate(**{RETRY: "now"})
    await drive(cluster, kubelet)
    assert (cluster.status.phase, kubelet.trained, list(cluster.objects)) == ("Complete", [3, 4], [("Pod", "bot-2-head")])


async def test_a_canceled_jobs_pods_get_the_time_for_a_checkpoint() -> None:
    cluster = FakeCluster(Clock(), raw_job())
    kubelet = FakeKubelet(cluster, total_steps=9)
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1, 2, 3])
    cluster.annotate(**{CANCEL: "true"})
    await drive(cluster, kubelet)
    assert (cluster.status.phase, cluster.objects, kubelet.saved) == ("Failed", {}, 3)
    cluster.annotate(**{CANCEL: "", RETRY: "1"})
    await drive(cluster, kubelet)
    assert (cluster.status.phase, kubelet.trained) == ("Complete", [1, 2, 3, 4, 5, 6, 7, 8, 9])
