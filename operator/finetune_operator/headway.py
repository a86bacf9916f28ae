"""Whether the training gets on: when the last step was seen to be done, and a training that is stuck. Pure.

Only the time between two steps counts. While the workers load, compile, measure or save, and while nothing is heard of them, the trainer
names no time (`Progress.lastStepTime`), so nothing is held against it. The times are this operator's own: no other clock is trusted.
"""

from datetime import datetime

from finetune_api.reasons import Reason
from finetune_api.report import Report
from finetune_api.status import TEXT_MAX, Progress, Status
from finetune_operator.endings import counted
from finetune_operator.failures import Ending, failure
from finetune_operator.look import Look, Verdict, too_soon
from finetune_operator.observed import head_name
from finetune_operator.reported import current_stage
from finetune_operator.times import in_order, later, rfc3339

STEPS_WAITED = 10
"""Steps' time that a step may take, where that is longer than progressDeadlineSeconds."""


def with_last_step(before: Status, after: Status, report: Report | None, now: datetime, clock_set: datetime | None = None) -> Status:
    """The status with the time at which its last step was first seen; without one where no steps are being taken just now.

    Where the clock was set since (`clock_set`), or that time has yet to come, it is now: nothing can be told from the difference.
    """
    if after.progress is None or report is None:
        return after
    said, known = report.progress, before.progress
    seen: str | None = rfc3339(now)
    if said is None or said.last_step_time is None:
        seen = None
    elif known is not None and known.last_step_time is not None and known.step == said.step:
        seen = known.last_step_time if in_order(known.last_step_time, now, clock_set) else seen
    return after.model_copy(update={"progress": after.progress.model_copy(update={"last_step_time": seen})})


def stalled(look: Look) -> Verdict | None:
    """The head answers, and says that steps are being taken; but none was for too long. Another attempt goes on from the checkpoint."""
    progress, number = look.status.progress, look.attempt.number
    head = look.observed.head(number)
    if not look.attempt.running or head is None or not head.running or look.observed.report_of(look.job.uid, number) is None:
        return None
    if progress is None or progress.last_step_time is None or current_stage(look.status.stages) != "Train":
        return None
    seconds = max(look.spec.progress_deadline_seconds, STEPS_WAITED * seconds_of_a_step(progress))
    if look.now < later(progress.last_step_time, seconds) or too_soon(look.observed, seconds):
        return None
    words = f"no step after step {progress.step} of {progress.total_steps} within {seconds:.0f} s (progressDeadlineSeconds)"
    why = failure(Reason.NO_PROGRESS, words, stage="Train").model_copy(update={"pod": head_name(look.job.name, number)})
    return counted(look, Ending(Reason.NO_PROGRESS, words[:TEXT_MAX], why))


def seconds_of_a_step(progress: Progress) -> float:
    """How long a step takes, by the estimate that was made with the last one; 0 where there is none."""
    left = progress.total_steps - progress.step
    return (progress.eta_seconds or 0) / left if left > 0 else 0.0
