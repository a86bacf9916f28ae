"""How attempts and jobs end: what the status keeps of it. Pure."""

from datetime import datetime, timedelta
from typing import Any

from finetune_api.reasons import Reason
from finetune_api.status import TEXT_MAX, Stage, Status
from finetune_operator.conditions import Summary
from finetune_operator.failures import Ending, failure
from finetune_operator.look import Look, Verdict
from finetune_operator.reported import current_stage
from finetune_operator.times import later, not_before, rfc3339

RETRY_MAX_SECONDS = 360.0
"""Longest wait between two attempts, as for a Kubernetes Job."""


def finish(status: Status, now: datetime) -> dict[str, Any]:
    """The job ends: the attempt with it, and nothing more is wanted."""
    attempt = status.attempt
    ended = attempt.end_time or not_before(now, attempt.start_time)
    attempt = attempt.model_copy(update={"end_time": ended, "waiting_time": None, "retry_time": None})
    return {"completion_time": not_before(now, status.start_time), "attempt": attempt, "workers_wanted": 0, "workers_ready": 0}


def done(status: Status, now: datetime) -> dict[str, Any]:
    """The job ends as its user wanted: with it, the stages whose end its head had no more time to tell."""
    return {"stages": tuple(_succeeded(stage, now) for stage in status.stages), **finish(status, now)}


def _succeeded(stage: Stage, now: datetime) -> Stage:
    if stage.state not in ("Pending", "Running"):
        return stage
    ended = not_before(now, stage.start_time)
    return stage.model_copy(update={"state": "Succeeded", "start_time": stage.start_time or ended, "end_time": ended})


def end(look: Look, reason: Reason, message: str, **figures: int | str) -> dict[str, Any]:
    """The attempt ends, the job does not."""
    ended = {
        "end_time": not_before(look.now, look.attempt.start_time),
        "end_reason": reason,
        "end_message": message[:TEXT_MAX],
        "waiting_time": None,
    }
    attempt = look.attempt.model_copy(update={**ended, **figures})
    return {"attempt": attempt, "workers_wanted": 0, "workers_ready": 0, **let_in(look.status, look.now)}


def counted(look: Look, ending: Ending) -> Verdict:
    """A preemption is made good at once; a failure is tried again after a while, if that may help and the user allows it."""
    attempt, base = look.attempt, look.settings.retry_base_seconds
    summary = Summary("Pending", Reason.RETRYING, ending.message)
    if ending.failure is None:
        # Not sooner than the last one began plus the base: a node that takes pods away as soon as they come must not be asked without end.
        retry = rfc3339(later(attempt.start_time or rfc3339(look.now), base))
        return Verdict(summary, end(look, ending.reason, ending.message, preemptions=attempt.preemptions + 1, retry_time=retry))
    failures = attempt.failures + 1
    against = failures - attempt.forgiven_failures
    wait = min(base * 2 ** min(against - 1, 16), RETRY_MAX_SECONDS)
    ended = end(look, ending.reason, ending.message, failures=failures, retry_time=rfc3339(look.now + timedelta(seconds=wait)))
    changes = {**ended, "failure": ending.failure}
    if ending.failure.retryable and against <= look.spec.backoff_limit:
        return Verdict(summary, changes)
    reason, message = ending.reason, ending.message
    if ending.failure.retryable:
        reason, message = Reason.BACKOFF_LIMIT_EXCEEDED, f"attempt {attempt.number} was the last of {against} that failed: {message}"
    changes |= {**finish(look.status.model_copy(update=changes), look.now), "stages": _stopped(look.status, look.now)}
    return Verdict(Summary("Failed", reason, message), changes)


def too_far(look: Look) -> bool:
    """Whether the next attempt would begin later than any wait lasts: the clock has been set back since."""
    longest = max(RETRY_MAX_SECONDS, look.settings.retry_base_seconds)
    return look.attempt.retry_time is not None and later(look.attempt.retry_time, 0) > look.now + timedelta(seconds=longest)


def failed(look: Look, reason: Reason, message: str) -> Verdict:
    """The job fails, and another attempt would not help."""
    why = failure(reason, message, retryable=False, stage=current_stage(look.status.stages))
    ended = look.status.model_copy(update=end(look, reason, why.message)) if look.attempt.running else look.status
    changes = {"failure": why, "stages": _stopped(look.status, look.now), **finish(ended, look.now)}
    return Verdict(Summary("Failed", reason, why.message), changes)


def rested(status: Status, since: str | None, now: datetime) -> dict[str, Any]:
    """The time since then is no time of the job's: activeDeadlineSeconds does not count it."""
    seconds = int((now - later(since, 0)).total_seconds()) if since else 0
    return {"suspended_seconds": status.suspended_seconds + max(seconds, 0)}


def let_in(status: Status, now: datetime) -> dict[str, Any]:
    """No queue holds the job back, or no longer."""
    return {"queued_time": None, **rested(status, status.queued_time, now)} if status.queued_time else {}


def _stopped(status: Status, now: datetime) -> tuple[Stage, ...]:
    """The stages of a job that failed: the one that was running did not end well."""
    return tuple(
        stage.model_copy(update={"state": "Failed", "end_time": not_before(now, stage.start_time)}) if stage.state == "Running" else stage
        for stage in status.stages
    )
