"""What is remembered of workers that died, and what is told of the last lines of a log."""

import pytest
from tests.builders import at, make_pod, make_report, terminated
from tests.unit.operator.looks import HEAD, TRAINING, WORKERS, ended, step

from finetune_api.report import TERMINATION_MESSAGE_BYTES, parse_report, termination_message
from finetune_api.status import LOG_MAX, Failure

OOM = make_pod("worker", phase="Failed", containerStatuses=terminated(137, "OOMKilled", "loading\nready\n"))
LOST = make_report(
    "Train", outcome="Failed", failure=Failure(stage="Train", reason="WorkersLost", message="rank 0 lost rank 1", retryable=True)
)


def test_how_the_last_worker_died_stays_when_its_pod_is_gone() -> None:
    died = step(TRAINING, HEAD, OOM, WORKERS[1], report=make_report(), now=at(5))
    why = died.attempt.worker_failure
    assert why is not None
    assert (why.reason, why.pod, why.exit_code, why.log) == ("OOMKilled", "bot-1-worker-0", 137, "loading\nready")
    again = step(died, HEAD, *WORKERS, report=make_report(), now=at(30))
    assert again.attempt.worker_failure == why

    failed = step(again, ended(1, message=termination_message(LOST)), now=at(60))
    assert failed.failure is not None
    assert (failed.failure.reason, failed.failure.pod, failed.failure.stage) == ("OOMKilled", "bot-1-worker-0", "Train")
    assert failed.attempt.failures == 1
    next_one = step(failed, now=at(600))
    assert (next_one.attempt.number, next_one.attempt.worker_failure) == (2, None)


@pytest.mark.parametrize(
    "worker",
    [
        make_pod("worker", phase="Failed", reason="Evicted", message="The node was low on resource: memory."),
        make_pod("worker", phase="Succeeded", containerStatuses=terminated(0, "Completed")),
        make_pod("worker", phase="Failed", deletion=at(90), containerStatuses=terminated(137)),
        make_pod("worker", phase="Failed", containerStatuses=terminated(143)),
    ],
    ids=["evicted", "succeeded", "told to go", "stopped"],
)
def test_a_worker_that_went_did_not_die(worker) -> None:
    assert step(TRAINING, HEAD, worker, WORKERS[1], report=make_report(), now=at(5)).attempt.worker_failure is None


def test_the_last_lines_of_the_log_come_with_the_last_word_where_there_is_room() -> None:
    why = Failure(stage="Train", reason="InternalError", message="boom", log="Traceback\nKeyError: 1")
    told = parse_report(termination_message(make_report("Train", outcome="Failed", failure=why)))
    assert told is not None
    assert told.failure == why


@pytest.mark.parametrize("sign", ["x", "\u4e16", "\u0001", "\U0001f600"])
def test_they_give_way_to_the_reason(sign: str) -> None:
    why = Failure(stage="Train", reason="InternalError", message=sign * 300, log=f"{sign * 60}\n" * 33, hint="h" * 300)
    assert why.log is not None
    assert len(why.log) <= LOG_MAX
    text = termination_message(make_report("Train", outcome="Failed", failure=why))
    assert len(text.encode()) <= TERMINATION_MESSAGE_BYTES
    told = parse_report(text)
    assert told is not None
    assert told.failure is not None
    shown = "\ufffd" if sign == "\u0001" else sign  # a control character could change a reader's terminal
    assert (told.failure.reason, told.failure.message) == ("InternalError", shown * 300)
