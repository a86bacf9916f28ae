"""Why an attempt ended: each way that a head can end, and the reason that is given for it."""

import pytest
from tests.builders import T0, make_pod, make_report, terminated

from finetune_api.reasons import ADVICE
from finetune_api.status import LOG_MAX, Failure
from finetune_operator.failures import death_of, ending_of, explained
from finetune_operator.observed import Pod

DISRUPTED = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "preempted by team-b/urgent"}]
GPU = Failure(stage="Train", reason="GPUOutOfMemory", message="CUDA out of memory", retryable=True)
BAD_DATA = Failure(stage="Prepare", reason="DatasetInvalid", message="train.jsonl:7: invalid JSON", retryable=False)


def failed(code: int | None = 1, why: str = "Error", log: str = "", **status) -> Pod:
    containers = {} if code is None else {"containerStatuses": terminated(code, why, log)}
    return make_pod(phase="Succeeded" if code == 0 else "Failed", **containers, **status)


def said(failure: Failure | None = None, outcome: str = "Failed"):
    return make_report(outcome=outcome, failure=failure)


FAILURES = {
    "the trainer says why": (failed(1), said(GPU), "GPUOutOfMemory", True),
    "the trainer says that it cannot be helped": (failed(1), said(BAD_DATA), "DatasetInvalid", False),
    "the trainer says a word that nobody knows": (
        failed(1),
        said(Failure(reason="Gremlins", message="in the works")),
        "InternalError",
        True,
    ),
    "the trainer failed and says nothing": (failed(1), said(), "InternalError", True),
    "exit code 1 and a log": (failed(1, log="Traceback: boom"), None, "InternalError", True),
    "killed for its memory": (failed(137, "OOMKilled"), None, "OOMKilled", True),
    "killed, and not for its memory": (failed(137), None, "HeadLost", True),
    "killed for its memory, then deleted": (failed(137, "OOMKilled", deletion=T0), None, "OOMKilled", True),
    "crashed, then deleted": (failed(139, deletion=T0), None, "ProcessCrashed", True),
    "a segmentation fault": (failed(139), None, "ProcessCrashed", True),
    "success without a report": (failed(0, "Completed"), None, "InternalError", True),
    "its own volume is full": (
        failed(None, reason="Evicted", message='Usage of EmptyDir volume "tmp" exceeds the limit "20Gi".'),
        None,
        "StorageFull",
        True,
    ),
    "more ephemeral storage than its limit": (
        failed(137, reason="Evicted", message="Pod ephemeral local storage usage exceeds the total limit of containers 1Gi."),
        None,
        "StorageFull",
        True,
    ),
    "no container ever ran, for no known reason": (failed(None, reason="Mystery", message="who knows"), None, "InternalError", True),
}


@pytest.mark.parametrize(("pod", "report", "reason", "retryable"), FAILURES.values(), ids=FAILURES)
def test_a_failure_has_its_reason(pod, report, reason, retryable) -> None:
    ending = ending_of(pod, report, "Train")
    assert ending.failure is not None
    assert (ending.reason, ending.failure.reason, ending.failure.retryable) == (reason, reason, retryable)
    assert ending.failure.pod == "bot-1-head"
    assert ending.failure.exit_code == (pod.exit.code if pod.exit else None)
    assert ending.failure.hint
    assert reason in ADVICE


PREEMPTIONS = {
    "preempted by the scheduler": (failed(143, conditions=DISRUPTED), None, "Preempted"),
    "preempted, and the trainer failed of it": (failed(1, conditions=DISRUPTED), said(GPU), "Preempted"),
    "deleted, and killed in the end": (failed(137, deletion=T0), None, "Preempted"),
    "deleted, and its container's end forgotten": (failed(None, deletion=T0), None, "Preempted"),
    "preempted, and killed in the end": (failed(137, conditions=DISRUPTED), None, "Preempted"),
    "the node is short of memory": (failed(137, reason="Evicted", message="The node was low on resource: memory."), None, "Evicted"),
    "the node shut down": (
        failed(143, reason="Terminated", message="Pod was terminated in response to imminent node shutdown."),
        None,
        "NodeLost",
    ),
    "the node is lost": (failed(None, reason="NodeLost", message="Node n1 which was running pod is unresponsive"), None, "NodeLost"),
    "the node has no GPU left": (
        failed(None, reason="OutOfnvidia.com/gpu", message="Node didn't have enough resource"),
        None,
        "NodeRejected",
    ),
    "the kubelet refused the pod": (failed(None, reason="UnexpectedAdmissionError", message="Allocate failed"), None, "NodeRejected"),
    "somebody stopped it": (failed(143), None, "Preempted"),
    "somebody stopped it, and it left a checkpoint": (failed(143), said(None, "Interrupted"), "Preempted"),
}


@pytest.mark.parametrize(("pod", "report", "reason"), PREEMPTIONS.values(), ids=PREEMPTIONS)
def test_what_the_cluster_takes_away_is_no_failure(pod, report, reason) -> None:
    ending = ending_of(pod, report, "Train")
    assert (ending.reason, ending.failure) == (reason, None)
    assert "bot-1-head" in ending.message


def test_the_last_words_of_a_log_are_kept_and_bounded() -> None:
    ending = ending_of(failed(1, log="x" * 5000 + "\nKeyError: 'prompt'\n"), None, "Prepare")
    assert ending.failure is not None
    assert ending.failure.message.endswith("KeyError: 'prompt'")
    assert ending.failure.log == "KeyError: 'prompt'"
    long = ending_of(failed(1, log="\n".join(f"line {number}" for number in range(1000))), None, "Prepare").failure
    assert long is not None
    assert long.log is not None
    assert long.log.startswith("line ")
    assert long.log.endswith("\nline 999")
    assert LOG_MAX - 10 < len(long.log) <= LOG_MAX


def test_the_marks_of_a_traceback_are_no_words() -> None:
    """They come below the code."""
    frame = '  File "run.py", line 7, in main\n    data["prompt"].strip()\n    ~~~~^^^^^^^^^^\n'
    ending = ending_of(failed(1, log=frame * 20 + "KeyError: 'prompt'\n    ^^^^\n\n"), None, "Prepare")
    assert ending.message.partition("its last words: ")[2] == "KeyError: 'prompt'"
    assert ending.failure is not None
    assert ending.failure.log is not None
    assert {line.strip() for line in ending.failure.log.splitlines()[:-1]} == {'File "run.py", line 7, in main', 'data["prompt"].strip()'}
    assert ending_of(failed(1, log="    ^^^^\n"), None, "Prepare").message.endswith("gave no reason")


def test_a_token_in_the_last_words_of_a_log_does_not_come_into_the_status() -> None:
    """A head that crashed had no time to leave anything out; the kubelet hands on the end of its log."""
    token = "hf_" + "A1b2" * 8
    log = f"GET https://hub/api?X-Amz-Security-Token=abc/def&v=1 Authorization: Bearer {token}\nusing {token}\nSegmentation fault\n"
    ending = ending_of(failed(139, log=log), None, "Prepare")
    assert ending.failure is not None
    assert ending.failure.log == "GET https://hub/api?X-Amz-Security-Token=***&v=1 Authorization: ***\nusing ***\nSegmentation fault"
    assert ending.message.endswith("Segmentation fault")
    half = ending_of(failed(1, log=f"{token[8:]} " + "x" * 2030 + "\nKeyError"), None, "Prepare")
    assert half.failure is not None
    assert half.failure.log == "KeyError", "the kubelet's limit cut the first line, and what it holds cannot be known for a secret"


def test_what_the_trainer_says_is_hidden_where_it_must_be() -> None:
    """The head is a tenant's pod: the operator does not rely on it."""
    token = "hf_" + "A1b2" * 8
    ending = ending_of(failed(1), said(Failure(reason="InternalError", message=f"with {token}", log=f"line\n{token}")), "Train")
    assert ending.failure is not None
    assert (ending.failure.message, ending.failure.log) == ("with ***", "line\n***")


LOST = Failure(stage="Train", reason="WorkersLost", message="worker 0 lost the connection", retryable=True)


def test_workers_that_are_lost_are_lost_of_what_the_last_one_died_of() -> None:
    worker = make_pod("worker", phase="Failed", containerStatuses=terminated(137, "OOMKilled"))
    ending = explained(ending_of(failed(1), said(LOST), "Train"), death_of(worker))
    assert ending.failure is not None
    assert (ending.reason, ending.failure.reason, ending.failure.stage) == ("OOMKilled", "OOMKilled", "Train")
    assert (ending.failure.pod, ending.failure.exit_code) == ("bot-1-worker-0", 137)
    assert ending.message == "pod bot-1-worker-0 needed more memory than its limit; then: worker 0 lost the connection"
    assert "compute.resourcesPerWorker" in (ending.failure.hint or "")


@pytest.mark.parametrize(
    ("worker", "said_by_head"),
    [
        (make_pod("worker", phase="Failed", containerStatuses=terminated(137)), LOST),
        (make_pod("worker", phase="Failed", containerStatuses=terminated(137, "OOMKilled")), GPU),
        (make_pod("worker", phase="Failed", conditions=DISRUPTED, containerStatuses=terminated(143)), LOST),
    ],
    ids=["it was killed, nobody knows why", "the head knows better", "it was taken away"],
)
def test_else_what_the_head_says_stays(worker, said_by_head) -> None:
    ending = explained(ending_of(failed(1), said(said_by_head), "Train"), death_of(worker))
    assert ending.reason == said_by_head.reason
    assert ending.message == said_by_head.message


def test_the_hint_for_a_head_without_memory_names_the_platforms_setting() -> None:
    ending = ending_of(failed(137, "OOMKilled"), None, "Prepare")
    assert ending.failure is not None
    assert "FINETUNE_HEAD_MEMORY" in (ending.failure.hint or "")
