"""The Events between two statuses, and when a job is looked at again."""

from dataclasses import replace

import pytest
from tests.builders import SETTINGS, at, make_job, make_pod, make_report, terminated

from finetune_api.reasons import Reason
from finetune_api.status import Progress, Stage, Status
from finetune_operator.lifecycle import advance
from finetune_operator.observed import Observed, Waiting
from finetune_operator.pace import next_look
from finetune_operator.transitions import events_between

HEAD, WORKERS = make_pod(), (make_pod("worker", index=0), make_pod("worker", index=1))


def look(before: Status, *pods, report=None, seconds: float = 0, **spec) -> Status:
    return advance(make_job(status=before, **spec), Observed(tuple(pods), frozenset({1}), report), SETTINGS, at(seconds))


BEGUN = look(Status())
BASELINE = (Stage(name="Prepare", state="Succeeded"), Stage(name="Baseline", state="Running"))
PREPARING = look(BEGUN, HEAD, report=make_report("Prepare"), seconds=10)
TRAINING = look(PREPARING, HEAD, *WORKERS, report=make_report(progress=Progress(step=5)))
WARNED = look(TRAINING, HEAD, *WORKERS, report=make_report(warnings=("the data is small",)), seconds=30)
WARNED_BEFORE = look(WARNED, seconds=600)
FAILED_HEAD = make_pod(phase="Failed", containerStatuses=terminated(137, "OOMKilled"))
SUSPENDED = look(look(TRAINING, HEAD, seconds=100, suspend=True), seconds=130, suspend=True)
COMPLETE = look(TRAINING, HEAD, report=make_report("Publish", outcome="Succeeded", message="published"), seconds=60)
PENDING = make_pod(phase="Pending")
STUCK = replace(PENDING, waiting=Waiting(Reason.SECRET_NOT_FOUND, 'pod bot-1-head: secret "hub" not found'))

TRANSITIONS = {
    "the job is new": (Status(), BEGUN, [("Normal", "Accepted", "attempt 1 begins")]),
    "the preparation begins": (BEGUN, PREPARING, []),
    "the baseline is measured": (PREPARING, look(PREPARING, HEAD, *WORKERS, report=make_report(stages=BASELINE)), []),
    "the training begins": (PREPARING, TRAINING, []),
    "the evaluation begins": (TRAINING, look(TRAINING, HEAD, *WORKERS, report=make_report("Evaluate"), seconds=60), []),
    "the publication begins": (TRAINING, look(TRAINING, HEAD, report=make_report("Publish"), seconds=60), []),
    "only progress": (TRAINING, look(TRAINING, HEAD, *WORKERS, report=make_report(progress=Progress(step=9)), seconds=60), []),
    "a pod waits": (BEGUN, look(BEGUN, STUCK), [("Warning", "SecretNotFound", 'pod bot-1-head: secret "hub" not found')]),
    "a worker is lost": (
        TRAINING,
        look(TRAINING, HEAD, WORKERS[0], report=make_report(), seconds=60),
        [("Warning", "WorkersLost", "1 of 2 workers run")],
    ),
    "the trainer warns": (
        TRAINING,
        look(TRAINING, HEAD, *WORKERS, report=make_report(warnings=("the data is small", "micro-batch halved")), seconds=60),
        [("Warning", "Warned", "the data is small"), ("Warning", "Warned", "micro-batch halved")],
    ),
    "the trainer warns of one thing more": (
        WARNED,
        look(WARNED, HEAD, *WORKERS, report=make_report(warnings=("the data is small", "micro-batch halved")), seconds=60),
        [("Warning", "Warned", "micro-batch halved")],
    ),
    "the next attempt warns of the same": (
        WARNED_BEFORE,
        look(WARNED_BEFORE, make_pod(attempt=2), report=make_report("Prepare", attempt=2, warnings=("the data is small",)), seconds=620),
        [],
    ),
    "an attempt fails": (
        TRAINING,
        look(TRAINING, FAILED_HEAD),
        [("Warning", "OOMKilled", "attempt 1 failed: pod bot-1-head needed more memory than its limit")],
    ),
    "the last attempt fails": (
        TRAINING,
        look(TRAINING, FAILED_HEAD, backoffLimit=0),
        [("Warning", "BackoffLimitExceeded", "attempt 1 was the last of 1 that failed: pod bot-1-head needed more memory than its limit")],
    ),
    "an attempt is taken away and the next begins": (
        TRAINING,
        look(TRAINING, seconds=600),
        [
            ("Warning", "HeadLost", "attempt 1 was taken away: pod bot-1-head has gone without a word: it was deleted, or its node was"),
            ("Normal", "Retrying", "attempt 2 begins"),
        ],
    ),
    "the job is suspended": (
        TRAINING,
        look(TRAINING, HEAD, suspend=True),
        [("Normal", "Suspended", "suspending: the pods save a checkpoint, then go")],
    ),
    "the job goes on": (SUSPENDED, look(SUSPENDED, seconds=500), [("Normal", "Resumed", "attempt 2 begins")]),
    "the job ends": (TRAINING, COMPLETE, [("Normal", "Succeeded", "published")]),
    "an ended job is edited": (COMPLETE, look(COMPLETE, HEAD, suspend=True), []),
}


@pytest.mark.parametrize(("before", "after", "told"), TRANSITIONS.values(), ids=TRANSITIONS)
def test_each_transition_is_told_once(before, after, told) -> None:
    events = events_between(make_job(), before, after)
    assert [(event.type, event.reason, event.message) for event in events] == told
    assert [event.name for event in events] == [event.name for event in events_between(make_job(), before, after)]
    assert len({event.name for event in events}) == len(events)
    assert all(event.name.startswith("bot.") for event in events)


def test_workers_that_are_lost_again_are_told_again() -> None:
    once = look(TRAINING, HEAD, WORKERS[0], report=make_report(), seconds=60)
    back = look(once, HEAD, *WORKERS, report=make_report(), seconds=70)
    again = look(back, HEAD, WORKERS[0], report=make_report(), seconds=80)
    (first,), (second,) = events_between(make_job(), TRAINING, once), events_between(make_job(), back, again)
    assert (first.reason, second.reason) == ("WorkersLost", "WorkersLost")
    assert first.name != second.name


WAITING_TO_RETRY = look(TRAINING, FAILED_HEAD, seconds=100)
NEXT_LOOKS = {
    "the head is to be made": (look(BEGUN), [], {}, 0, 2),
    "the head starts": (look(BEGUN, PENDING), [PENDING], {}, 0, 10),
    "the data is prepared": (look(BEGUN, HEAD, report=make_report("Prepare")), [HEAD], {}, 0, 2),
    "workers start": (look(TRAINING, HEAD, WORKERS[0], report=make_report()), [HEAD, WORKERS[0]], {}, 0, 2),
    "the training runs": (TRAINING, [HEAD, *WORKERS], {}, 0, 10),
    "the result is published": (look(TRAINING, HEAD, report=make_report("Publish")), [HEAD], {}, 0, 2),
    "a pod is stuck": (look(BEGUN, STUCK), [STUCK], {}, 0, 10),
    "the deadline for pods is near": (look(BEGUN, STUCK), [STUCK], {}, 1797, 3),
    "the deadline of the job is near": (TRAINING, [HEAD, *WORKERS], {"activeDeadlineSeconds": 600}, 596, 4),
    "the next attempt waits": (WAITING_TO_RETRY, [FAILED_HEAD], {}, 101, 9),
    "pods are to go before the next attempt": (WAITING_TO_RETRY, [FAILED_HEAD, WORKERS[0]], {}, 101, 2),
    "pods are still going when the next attempt is due": (WAITING_TO_RETRY, [FAILED_HEAD, WORKERS[0]], {}, 130, 2),
    "the deadline passes while pods go into suspension": (
        look(TRAINING, HEAD, suspend=True),
        [HEAD],
        {"suspend": True, "activeDeadlineSeconds": 600},
        700,
        2,
    ),
    "suspended, and nothing left": (SUSPENDED, [], {"suspend": True}, 200, None),
    "suspended, and a pod is going": (SUSPENDED, [make_pod(phase="Failed")], {"suspend": True}, 200, 2),
    "ended": (COMPLETE, [make_pod(phase="Succeeded")], {}, 100, None),
    "ended, and the head has not yet": (COMPLETE, [HEAD], {}, 61, 2),
    "ended, to be deleted": (COMPLETE, [make_pod(phase="Succeeded")], {"ttlSecondsAfterFinished": 600}, 160, 500),
}


@pytest.mark.parametrize(("status", "pods", "spec", "seconds", "expected"), NEXT_LOOKS.values(), ids=NEXT_LOOKS)
def test_when_a_job_is_looked_at_again(status, pods, spec, seconds, expected) -> None:
    job = make_job(status=status, **spec)
    assert next_look(job, status, Observed(tuple(pods)), SETTINGS, at(seconds)) == expected


def test_objects_that_are_left_are_looked_after() -> None:
    job = make_job(status=COMPLETE)
    assert next_look(job, COMPLETE, Observed((), frozenset({1})), SETTINGS, at(100)) == 2
