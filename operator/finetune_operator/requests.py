"""What people ask of a job by its annotations: to try again, to give up, to leave it alone. Pure.

The annotations say how things should be, so nothing is lost when the operator is away: a job is canceled for as long as it says so, and
a retry is known from one that was made before by its value, which the status keeps.
"""

import hashlib
from dataclasses import replace
from datetime import datetime
from typing import Any

from finetune_api import ANNOTATION_CANCEL, ANNOTATION_RECONCILE, ANNOTATION_RETRY
from finetune_api.reasons import Reason
from finetune_api.resolved_profile import ResolvedProfile
from finetune_api.status import RETRY_MAX, Status
from finetune_operator.budget import used_up
from finetune_operator.conditions import Summary
from finetune_operator.endings import end, failed, rested
from finetune_operator.look import Look, Verdict
from finetune_operator.observed import Job, Observed
from finetune_operator.pace import SOON_SECONDS, deadline
from finetune_operator.settings import Settings

_REVIVABLE = f"to go on from the last checkpoint, remove the annotation {ANNOTATION_CANCEL} and set {ANNOTATION_RETRY} to a new value"


PAUSED_SECONDS = 60.0
"""How often the GPU-hours of a job are looked at that is left alone."""


def is_paused(job: Job) -> bool:
    """Whether somebody wants nothing to be done for this job."""
    return job.annotations.get(ANNOTATION_RECONCILE) == "disabled"


def is_canceled(job: Job) -> bool:
    """Whether somebody has given the job up."""
    return job.annotations.get(ANNOTATION_CANCEL) == "true"


def beyond_profile(job: Job, now: datetime) -> bool:
    """Whether the job has used up what its profile grants. Its user sets the annotation: that must not keep GPUs for him for ever."""
    kept = _profile(job)
    if kept is None or job.spec is None:
        return False
    if job.status.finished:  # the limits of a measuring run are its own
        run, why = job.status.monitoring and job.status.monitoring.run, job.status.failure
        limited = kept.active_deadline_seconds is not None or kept.max_gpu_hours is not None
        return limited and (bool(run and run.running) or bool(why and why.reason == Reason.DEADLINE_EXCEEDED))
    latest = deadline(job.spec, job.status) if kept.active_deadline_seconds is not None else None
    return (latest is not None and now >= latest) or (kept.max_gpu_hours is not None and used_up(job.spec, job.status))


def _profile(job: Job) -> ResolvedProfile | None:
    return job.status.resolved.profile if job.status.resolved else None


def is_left_alone(job: Job, now: datetime) -> bool:
    """Whether nothing is done for this job: somebody wants that, and its profile lets him."""
    return is_paused(job) and not beyond_profile(job, now)


def next_limit(job: Job, observed: Observed, settings: Settings, now: datetime) -> float | None:
    """Seconds until a job that is left alone may have used up what its profile grants; None where it never will."""
    kept = _profile(job)
    if job.deleting or kept is None or job.spec is None:
        return None
    if not is_left_alone(job, now):
        return min(SOON_SECONDS, settings.poll_seconds)
    if job.status.finished:
        return None
    latest = deadline(job.spec, job.status) if kept.active_deadline_seconds is not None else None
    waits = [(latest - now).total_seconds()] if latest else []
    holding = kept.max_gpu_hours is not None and any(pod.gpus for pod in observed.alive)
    return min((*waits, *((PAUSED_SECONDS,) if holding else ())), default=None)


def paused(look: Look) -> Verdict | None:
    """Nothing is done, and that is said: pods stay as they are, and what is reported is not asked for."""
    if not is_left_alone(replace(look.job, status=look.status), look.now):
        return None
    words = f"the annotation {ANNOTATION_RECONCILE} is disabled: nothing is done for this job until it is removed"
    # The operator has not acted on a job that it has never been allowed to act on.
    return Verdict(Summary(look.status.phase or "Pending", Reason.PAUSED, words), {"start_time": look.status.start_time})


def canceling(look: Look) -> Verdict | None:
    """The job is given up: its pods get the time to save a checkpoint, since a retry may go on from it."""
    if not is_canceled(look.job) or not (look.attempt.running or look.observed.alive):
        return None
    summary = Summary(look.status.phase or "Pending", Reason.CANCELED, "canceling: the pods save a checkpoint, then go")
    return Verdict(summary, end(look, Reason.CANCELED, summary.message) if look.attempt.running else {})


def canceled(look: Look) -> Verdict | None:
    """The pods of a job that was given up have gone."""
    if not is_canceled(look.job):
        return None
    verdict = failed(look, Reason.CANCELED, f"the annotation {ANNOTATION_CANCEL} is true; {_REVIVABLE}")
    return Verdict(
        verdict.summary, {**verdict.changes, **rested(look.status, look.status.suspended_time, look.now), "suspended_time": None}
    )


def noted(job: Job) -> Status:
    """The status of a job that has not ended, with the retry that was asked for and has nothing to do: it does not wait for a failure."""
    asked = _asked(job)
    if asked is None or is_canceled(job) or is_paused(job):
        return job.status
    return job.status.model_copy(update={"retry_seen": asked})


def revival(job: Job, now: datetime) -> Verdict | None:
    """A failed job whose user asks for another try: with the counts and checkpoints that it has, and all of its backoffLimit again."""
    status, asked = job.status, _asked(job)
    has_failed = (failed_is := status.condition("Failed")) is not None and failed_is.status == "True"
    if not has_failed or asked in (None, status.retry_seen) or is_canceled(job) or is_paused(job):
        return None
    attempt = status.attempt.model_copy(update={"forgiven_failures": status.attempt.failures})
    changes: dict[str, Any] = {
        "attempt": attempt,
        "retry_seen": asked,
        "completion_time": None,
        "failure": None,
        **rested(status, status.completion_time, now),
    }
    return Verdict(Summary("Pending", Reason.RETRYING, f"the annotation {ANNOTATION_RETRY} asks for another attempt"), changes)


def _asked(job: Job) -> str | None:
    """The value of the retry annotation as the status keeps it: a long one by its digest."""
    value = job.annotations.get(ANNOTATION_RETRY) or None
    return value if value is None or len(value) <= RETRY_MAX else hashlib.sha256(value.encode()).hexdigest()
