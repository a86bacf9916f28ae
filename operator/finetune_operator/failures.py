"""Why an attempt ended: from what its head said, and what the cluster says of the head's pod. Pure.

What the kubelet knows comes first, then what the trainer said, then what the log's last lines say (`finetune_api.symptoms`). The exit code
comes last: 137 alone may be a lack of memory, a node that was switched off, or `kill -9`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from finetune_api.reasons import ADVICE, Reason
from finetune_api.report import EXIT_INTERRUPTED, Report, parse_report
from finetune_api.scrub import brief, last_lines, scrub, telling_lines
from finetune_api.status import LOG_MAX, TEXT_MAX, Failure, StageName
from finetune_api.symptoms import CONSEQUENCES, recognise
from finetune_operator.diagnosis import STORAGE_LIMIT
from finetune_operator.observed import Pod

KUBELET_BYTES = 2048
"""Of a log's end that the kubelet keeps where there is no termination message: a longer one begins within a line, or within a secret."""


@dataclass(frozen=True)
class Ending:
    """How an attempt ended without success."""

    reason: Reason
    message: str
    failure: Failure | None
    """None where the cluster took the attempt away: that is a preemption, and not the job's failure."""


@dataclass(frozen=True)
class Head:
    """A head pod that has ended, what it said, and the stage it was in."""

    pod: Pod
    report: Report | None
    stage: StageName | None

    @property
    def code(self) -> int | None:
        """Exit code of its container; None where it never ran."""
        return self.pod.exit.code if self.pod.exit else None


def ending_of(pod: Pod, report: Report | None, stage: StageName | None) -> Ending:
    """How the attempt of this head ended."""
    head = Head(pod, report, stage)
    return next(ending for check in _CHECKS if (ending := check(head)) is not None)


def death_of(worker: Pod) -> Failure | None:
    """How a worker pod that has ended did; None where the cluster took it away, or it was told to go."""
    return ending_of(worker, None, None).failure


def head_lost(name: str) -> Ending:
    """The ending of an attempt whose head pod is no longer there."""
    return Ending(Reason.HEAD_LOST, f"pod {name} has gone without a word: it was deleted, or its node was", failure=None)


def explained(ending: Ending, death: Failure | None) -> Ending:
    """The ending, or where the head knows only that workers are gone, why the last one that died did."""
    told = ending.failure
    if told is None or death is None or ending.reason not in CONSEQUENCES or death.reason in (*CONSEQUENCES, *_SAYS_NOTHING):
        return ending
    words = f"{death.message}; then: {told.message}"[:TEXT_MAX]
    cause = death.model_copy(update={"stage": told.stage, "message": words, "log": death.log or told.log})
    return Ending(Reason(death.reason), words, cause)


_SAYS_NOTHING = (Reason.INTERNAL_ERROR, Reason.HEAD_LOST)


def failure(reason: Reason, message: str, *, retryable: bool | None = None, stage: StageName | None = None) -> Failure:
    """A failure with the advice that goes with its reason."""
    advice = ADVICE[reason]
    again = advice.retryable if retryable is None else retryable
    return Failure(stage=stage, reason=reason, message=message[:TEXT_MAX], hint=advice.hint, retryable=again)


def _taken_away(head: Head) -> Ending | None:
    """The cluster says that it took the pod: whatever the trainer said while it was being stopped follows from that."""
    taken = head.pod.disruption
    return Ending(taken.reason, f"pod {head.pod.name}: {taken.words}"[:TEXT_MAX], failure=None) if taken else None


def _said_why(head: Head) -> Ending | None:
    """The trainer knows best."""
    if head.report is None or head.report.failure is None:
        return None
    said = head.report.failure
    if said.reason not in ADVICE:
        return _failed(head, Reason.INTERNAL_ERROR, f"{said.reason}: {said.message}")
    advice = ADVICE[Reason(said.reason)]
    told = said.model_copy(
        update={
            "message": brief(said.message, TEXT_MAX),
            "pod": said.pod or head.pod.name,
            "exit_code": head.code,
            "hint": said.hint or advice.hint,
            "stage": said.stage or head.stage,
            "log": last_lines(said.log, LOG_MAX) if said.log else None,
        }
    )
    return Ending(Reason(said.reason), told.message, told)


def _was_interrupted(head: Head) -> Ending | None:
    """Somebody other than this operator stopped the pod."""
    if head.code != EXIT_INTERRUPTED and not (head.report and head.report.outcome == "Interrupted"):
        return None
    return Ending(Reason.PREEMPTED, f"pod {head.pod.name} was told to stop", failure=None)


def _was_deleted(head: Head) -> Ending | None:
    """Somebody deleted the head of a running attempt, which this operator never does, and it did not end by itself.

    Its grace was over (137), or its kubelet has forgotten how the container ended.
    """
    ended = head.pod.exit
    if head.pod.role != "head" or head.pod.deletion is None or (ended and (ended.code != 137 or ended.reason == "OOMKilled")):
        return None
    return Ending(Reason.PREEMPTED, f"pod {head.pod.name} was deleted", failure=None)


def _ran_out_of_memory(head: Head) -> Ending | None:
    if head.pod.exit is None or head.pod.exit.reason != "OOMKilled":
        return None
    ending = _failed(head, Reason.OUT_OF_MEMORY, f"pod {head.pod.name} needed more memory than its limit")
    if head.pod.role == "worker" or ending.failure is None:
        return ending
    hint = "The head pod prepares the data: ask your platform team for more memory for it (FINETUNE_HEAD_MEMORY of the operator)."
    return Ending(ending.reason, ending.message, ending.failure.model_copy(update={"hint": hint}))


def _filled_its_volumes(head: Head) -> Ending | None:
    if not STORAGE_LIMIT.search(head.pod.message):
        return None
    return _failed(head, Reason.STORAGE_FULL, f"pod {head.pod.name}: {head.pod.message}")


def _outlived_its_limit(head: Head) -> Ending | None:
    """No pod here is given a limit of its own time but by a policy of the namespace."""
    if head.pod.reason != "DeadlineExceeded":
        return None
    words = f"pod {head.pod.name}: {head.pod.message or 'it ran longer than it may'}; something here gives pods an activeDeadlineSeconds"
    return _failed(head, Reason.DEADLINE_EXCEEDED, words)


_NEVER_STARTED = ("StartError", "ContainerCannotRun", "RunContainerError", "CreateContainerError")
_NOT_EXECUTABLE = (126, 127)


def _could_not_start(head: Head) -> Ending | None:
    """The runtime could not start the container: its words stand where the log would."""
    if head.pod.exit is None or (head.pod.exit.reason not in _NEVER_STARTED and head.code not in _NOT_EXECUTABLE):
        return None
    return _failed(head, Reason.CONTAINER_START_FAILED, f"pod {head.pod.name} could not be started{_last_words(head)}")


def _printed_why(head: Head) -> Ending | None:
    """It died without a word to us, but its log ends in one that is known."""
    found = recognise(telling_lines(_log(head))) if head.code else None
    return _failed(head, found.reason, f"pod {head.pod.name} {_how(head)}: {scrub(found.line)}") if found else None


def _was_killed(head: Head) -> Ending | None:
    if head.code != 137:
        return None
    lost = head.pod.exit is not None and head.pod.exit.reason == "ContainerStatusUnknown"
    why = "its node forgot it: it was restarted, or did not answer" if lost else "and not for its memory"
    words = f"the process of pod {head.pod.name} was killed (SIGKILL), {why}"
    return _failed(head, Reason.HEAD_LOST if head.pod.role == "head" else Reason.WORKERS_LOST, words)


_CRASHES = {
    132: (Reason.PROCESS_CRASHED, "SIGILL"),
    134: (Reason.PROCESS_CRASHED, "SIGABRT"),
    135: (Reason.SHARED_MEMORY_FULL, "SIGBUS"),
    136: (Reason.PROCESS_CRASHED, "SIGFPE"),
    139: (Reason.PROCESS_CRASHED, "SIGSEGV"),
}
"""Exit codes of signals that a process brings upon itself."""


def _crashed(head: Head) -> Ending | None:
    if head.code not in _CRASHES:
        return None
    reason, signal = _CRASHES[head.code]
    return _failed(head, reason, f"pod {head.pod.name} {_how(head)} ({signal}){_last_words(head)}")


def _ended_otherwise(head: Head) -> Ending:
    if head.pod.exit is None:
        words = f"pod {head.pod.name} failed: {head.pod.reason} {head.pod.message}".rstrip()
    elif head.code == 0:
        words = f"pod {head.pod.name} ended without a report of its success"
    else:
        words = f"pod {head.pod.name} {_how(head)}, and gave no reason{_last_words(head)}"
    return _failed(head, Reason.INTERNAL_ERROR if head.pod.role == "head" else Reason.WORKERS_LOST, words)


def _how(head: Head) -> str:
    code = head.code or 0
    return f"was ended by signal {code - 128}" if 128 < code < 160 else f"exited with {code}"


def _last_words(head: Head) -> str:
    """The last line that says something, as the end of a sentence."""
    lines = telling_lines(scrub(_log(head)))
    return f"; its last words: {lines[-1].strip()}" if lines else ""


def _log(head: Head) -> str:
    """The end of the log, from its first whole line; empty where a report or nothing stands there."""
    said = head.pod.exit.message if head.pod.exit else ""
    if parse_report(said) is not None:
        return ""
    cut = len(said.encode(errors="replace")) >= KUBELET_BYTES and "\n" in said
    return said.partition("\n")[2] if cut else said


_CHECKS: tuple[Callable[[Head], Ending | None], ...] = (
    _taken_away,
    _said_why,
    _was_interrupted,
    _was_deleted,
    _ran_out_of_memory,
    _filled_its_volumes,
    _outlived_its_limit,
    _could_not_start,
    _printed_why,
    _was_killed,
    _crashed,
    _ended_otherwise,
)


def _failed(head: Head, reason: Reason, message: str) -> Ending:
    why = failure(reason, scrub(message), stage=head.stage)
    log = last_lines(_log(head), LOG_MAX) or None
    return Ending(reason, why.message, why.model_copy(update={"pod": head.pod.name, "exit_code": head.code, "log": log}))
