"""Why an attempt ended: from what its head said, and what the cluster says of the head's pod. Pure.

The exit code comes last: 137 alone may be a lack of memory, a node that was switched off, or `kill -9`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from finetune_api.reasons import ADVICE, Reason
from finetune_api.report import EXIT_INTERRUPTED, Report
from finetune_api.scrub import scrub, telling_lines
from finetune_api.status import TEXT_MAX, Failure, StageName
from finetune_operator.observed import STORAGE_LIMIT, Pod

LAST_WORDS = 600
"""Characters of a log that a message holds."""


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


def head_lost(name: str) -> Ending:
    """The ending of an attempt whose head pod is no longer there."""
    return Ending(Reason.HEAD_LOST, f"pod {name} has gone without a word: it was deleted, or its node was", failure=None)


def failure(reason: Reason, message: str, *, retryable: bool | None = None, stage: StageName | None = None) -> Failure:
    """A failure with the advice that goes with its reason."""
    advice = ADVICE[reason]
    again = advice.retryable if retryable is None else retryable
    return Failure(stage=stage, reason=reason, message=message[:TEXT_MAX], hint=advice.hint, retryable=again)


def _taken_away(head: Head) -> Ending | None:
    """The cluster says that it took the pod: whatever the trainer said while it was being stopped follows from that."""
    if head.pod.disruption is None:
        return None
    return Ending(Reason.PREEMPTED, f"pod {head.pod.name}: {head.pod.disruption}"[:TEXT_MAX], failure=None)


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
            "pod": said.pod or head.pod.name,
            "exit_code": head.code,
            "hint": said.hint or advice.hint,
            "stage": said.stage or head.stage,
        }
    )
    return Ending(Reason(said.reason), said.message, told)


def _was_interrupted(head: Head) -> Ending | None:
    """Somebody other than this operator stopped the pod."""
    if head.code != EXIT_INTERRUPTED and not (head.report and head.report.outcome == "Interrupted"):
        return None
    return Ending(Reason.PREEMPTED, f"pod {head.pod.name} was told to stop", failure=None)


def _ran_out_of_memory(head: Head) -> Ending | None:
    if head.pod.exit is None or head.pod.exit.reason != "OOMKilled":
        return None
    ending = _failed(head, Reason.OUT_OF_MEMORY, f"pod {head.pod.name} needed more memory than its limit")
    hint = "The head pod prepares the data: ask your platform team for more memory for it (FINETUNE_HEAD_MEMORY of the operator)."
    return Ending(ending.reason, ending.message, ending.failure.model_copy(update={"hint": hint}) if ending.failure else None)


def _filled_its_volumes(head: Head) -> Ending | None:
    if not STORAGE_LIMIT.search(head.pod.message):
        return None
    return _failed(head, Reason.STORAGE_FULL, f"pod {head.pod.name}: {head.pod.message}")


def _was_killed(head: Head) -> Ending | None:
    if head.code != 137:
        return None
    return _failed(head, Reason.HEAD_LOST, f"the process of pod {head.pod.name} was killed (SIGKILL), and not for its memory")


def _ended_otherwise(head: Head) -> Ending:
    if head.pod.exit is None:
        words = f"pod {head.pod.name} failed: {head.pod.reason} {head.pod.message}".rstrip()
    elif head.code == 0:
        words = f"pod {head.pod.name} ended without a report of its success"
    else:
        what = f"was ended by signal {head.pod.exit.code - 128}" if head.pod.exit.code > 128 else f"exited with {head.pod.exit.code}"
        last = _last_words(head.pod.exit.message)
        words = f"pod {head.pod.name} {what}, and gave no reason" + (f"; its last words: {last}" if last else "")
    return _failed(head, Reason.INTERNAL_ERROR, words)


def _last_words(log: str) -> str:
    """The end of a log, from the beginning of a line where one begins there."""
    text = "\n".join(telling_lines(scrub(log)))
    end = text[-LAST_WORDS:]
    return (end.partition("\n")[2] or end if len(text) > LAST_WORDS else end).strip()


_CHECKS: tuple[Callable[[Head], Ending | None], ...] = (
    _taken_away,
    _said_why,
    _was_interrupted,
    _ran_out_of_memory,
    _filled_its_volumes,
    _was_killed,
    _ended_otherwise,
)


def _failed(head: Head, reason: Reason, message: str) -> Ending:
    why = failure(reason, message, stage=head.stage)
    return Ending(reason, why.message, why.model_copy(update={"pod": head.pod.name, "exit_code": head.code}))
