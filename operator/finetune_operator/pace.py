"""How often: when progress is written, and when a job is looked at again. Pure."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from finetune_api.reasons import Reason
from finetune_api.status import Condition, ConditionType, Status
from finetune_api.v1alpha1 import Spec
from finetune_operator.conditions import PHASES
from finetune_operator.diagnosis import REFUSALS
from finetune_operator.observed import Job, Observed
from finetune_operator.reported import current_stage, onward
from finetune_operator.settings import Settings
from finetune_operator.times import later, rfc3339
from finetune_operator.usage import usage_waits

SOON_SECONDS = 2.0
"""Until the next look at a job that is about to change."""

_OTHERS_MUST_ACT = (
    Reason.SECRET_NOT_FOUND,
    Reason.CONFIG_MAP_NOT_FOUND,
    Reason.VOLUME_CLAIM_NOT_FOUND,
    Reason.IMAGE_PULL_FAILED,
    Reason.UNSCHEDULABLE,
    *REFUSALS,
    Reason.STORAGE_UNAVAILABLE,
    Reason.CONTAINER_START_FAILED,
)
_QUIET = ("message", "warnings", "resolved", "model", "data", "progress", "metrics", "usage", "checkpoints", "search")
"""What the head says that decides nothing: a head that says something else each time it is asked costs no more than one that trains."""
_TOLD = tuple(name for name in _QUIET if name != "usage")
_LONG_STAGES = ("Search", "Train")
_ON_ITS_WAY = (Reason.PENDING, *(reason for _, reason in PHASES.values()))
"""Reasons of these conditions while nothing is in the way."""
_SAY_WHAT_IS_IN_THE_WAY: tuple[ConditionType, ...] = ("Ready", "WorkersReady")
_TOLD_AT_ONCE: tuple[ConditionType, ...] = ("Accepted", "GatesPassed", "Degraded")
"""Conditions that say something else than how far the attempt is."""


def paced(before: Status, after: Status, settings: Settings, now: datetime) -> Status:
    """What only tells is written at most every `poll_seconds`, so that a job costs the API server the same whatever wakes the operator.

    That is progress; that the attempt is further on its way (its head is there, runs and answers, the next stage, more of its workers run);
    and the number of workers that run, while it is neither all of them nor was before. What is held back here is written as soon as it may
    be, unless something comes before that does not wait: `next_look` sees to it.
    """
    if usage_waits(before, after, settings, now):
        return before
    # A time that has yet to come was written before the clock was set back.
    recent = any(later(time, 0) <= now < later(time, settings.poll_seconds) for time in _written(before))
    if recent and _only_tells(before, after, settings, now):
        return before
    if after == before or after.progress is None:
        return after
    if all(getattr(after, name) == getattr(before, name) for name in (*_TOLD, "workers_ready", "stages")):
        return after
    return after.model_copy(update={"progress": after.progress.model_copy(update={"last_update_time": rfc3339(now)})})


def _written(status: Status) -> Iterable[str]:
    """When what waits here was last written, as far as the status says so."""
    begun = status.attempt.start_time if status.attempt.running else None
    told = status.progress.last_update_time if status.progress else None
    counted = status.usage.counted_time if status.usage else None
    return (time for time in (begun, told, counted) if time)


def _only_tells(before: Status, after: Status, settings: Settings, now: datetime) -> bool:
    """Whether nothing has changed that decides anything, that is told as an Event, or that somebody waits for."""
    alike: dict[str, Any] = {name: getattr(before, name) for name in _QUIET}
    # A head that was there for no longer than this has done nothing that its successor would not do again (workers are written at once),
    # so where it goes, it is made anew: only where that happens for longer is each of them counted, and waited for.
    ours: dict[str, Any] = {"lost_steps": before.attempt.lost_steps, "head_seen": before.attempt.head_seen}
    if _goes_on(before, after, settings, now):
        alike |= {name: getattr(before, name) for name in ("phase", "stages", "workers_ready", "conditions")}
        ours |= {"waiting_time": before.attempt.waiting_time}
    elif after.workers_ready != before.workers_ready and before.attempt.running and not (_all_run(before) or _all_run(after)):
        alike |= {"workers_ready": before.workers_ready, "conditions": _in_words_of(before, after)}
    return after.model_copy(update={**alike, "attempt": after.attempt.model_copy(update=ours)}) == before


def _goes_on(before: Status, after: Status, settings: Settings, now: datetime) -> bool:
    """Whether the attempt is further on its way, and that is all: no worker is lost, nothing stands in its way or did so before.

    The end of a wait that took longer than `poll_seconds` is written at once: workers that are lost right afterwards have all their time
    to come back (see `look.waiting_since`).
    """
    since = before.attempt.waiting_time
    short = after.attempt.waiting_time == since or (since is not None and now < later(since, settings.poll_seconds))
    known, facts = _facts(before), _facts(after)
    free = all(each[kind].reason in _ON_ITS_WAY for each in (known, facts) for kind in _SAY_WHAT_IS_IN_THE_WAY if kind in each)
    alike = all(known.get(kind) == facts.get(kind) for kind in _TOLD_AT_ONCE)
    return before.attempt.running and short and free and alike and after.workers_ready >= before.workers_ready


def _facts(status: Status) -> dict[ConditionType, Condition]:
    return {condition.type: condition for condition in status.conditions}


def _all_run(status: Status) -> bool:
    return status.workers_ready == status.workers_wanted


def _in_words_of(before: Status, after: Status) -> tuple[Condition, ...]:
    """The conditions of `after`, each with the message of `before` where the message is all that differs."""
    known = _facts(before)
    return tuple(each.model_copy(update={"message": known[each.type].message}) if each.type in known else each for each in after.conditions)


def deadline(spec: Spec, status: Status) -> datetime | None:
    """When activeDeadlineSeconds is over, time in suspension and in queues not counted; None while a queue decides."""
    if spec.active_deadline_seconds is None or status.start_time is None or status.queued_time is not None:
        return None
    return later(status.start_time, spec.active_deadline_seconds + status.suspended_seconds)


def expiry(spec: Spec | None, status: Status) -> datetime | None:
    """When ttlSecondsAfterFinished is over."""
    if spec is None or spec.ttl_seconds_after_finished is None or status.completion_time is None or not status.finished:
        return None
    return later(status.completion_time, spec.ttl_seconds_after_finished)


def next_look(job: Job, status: Status, observed: Observed, settings: Settings, now: datetime) -> float | None:
    """Seconds until the job should be looked at again, should nothing happen before. None where only an event can bring anything new."""
    if job.deleting:
        return None
    # An appointment that has passed was kept in this look; what still stands in its way (pods that are going) has an interval.
    held = max((later(time, settings.poll_seconds) for time in _written(status)), default=None) if status.attempt.running else None
    times = (held, *_appointments(job.spec, status))
    waits = [(time - now).total_seconds() for time in times if time and time > now]
    interval = _interval(job, status, observed, settings)
    if interval is not None:
        waits.append(interval)
    return max(min(waits), 0.1) if waits else None


def _appointments(spec: Spec | None, status: Status) -> list[datetime | None]:
    """The times at which the job's state changes by itself."""
    if spec is None or status.suspended_time is not None:
        return []
    attempt = status.attempt
    waiting = later(attempt.waiting_time, spec.pre_running_deadline_seconds) if attempt.waiting_time else None
    retry = later(attempt.retry_time, 0) if attempt.retry_time else None
    measured = later(status.monitoring.next_run_time, 0) if status.monitoring and status.monitoring.next_run_time else None
    return [expiry(spec, status), measured] if status.finished else [deadline(spec, status), waiting, retry]


def _interval(job: Job, status: Status, observed: Observed, settings: Settings) -> float | None:
    """Short while pods go and in the short stages, so that no GPU waits; long while pods start, the training runs, or others must act."""
    attempt, soon = status.attempt, min(SOON_SECONDS, settings.poll_seconds)
    if any(pod.forced for pod in observed.pods):
        soon = settings.poll_seconds  # Somebody's finalizer keeps a pod: nobody knows for how long.
    if status.finished and attempt.running:
        return settings.poll_seconds  # a measuring run (see monitoring.acting): nobody waits for it
    if status.finished or status.suspended_time is not None:
        return soon if _leaving(status, observed) else None
    if not attempt.running and _awaits_profile(status):
        return None  # a profile that appears gives the job a turn
    if not attempt.running:
        return None if attempt.retry_time and not observed.alive else soon
    ready = status.condition("Ready")
    stuck = ready is not None and ready.reason in _OTHERS_MUST_ACT
    head, workers = observed.head(attempt.number), observed.workers(attempt.number)
    making = head is None or len(workers) < status.workers_wanted
    # What becomes of a pod that exists is told by its watch; what a head says has to be asked for.
    report = observed.report_of(job.uid, attempt.number)
    stages = onward(status.stages, report.stages) if report else status.stages  # what it has just said may have yet to be written
    talking = head is not None and head.phase == "Running" and current_stage(stages) not in _LONG_STAGES
    return soon if (making or talking) and not stuck else settings.poll_seconds


def _awaits_profile(status: Status) -> bool:
    ready = status.condition("Ready")
    return ready is not None and ready.reason == Reason.PROFILE_NOT_FOUND


def _leaving(status: Status, observed: Observed) -> bool:
    """Whether something exists that should not, now that the job is at rest: all but the finished head of a job that ended."""
    stays = observed.head(status.attempt.number) if status.finished else None
    return bool(observed.anchors) or any(pod != stays or not pod.finished for pod in observed.pods)
