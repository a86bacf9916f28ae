"""The Events between two statuses of a job: what `kubectl describe` tells of its way. Pure."""

import hashlib
from collections.abc import Iterable
from typing import Literal

from finetune_api.reasons import ADVICE, Reason
from finetune_api.status import Status
from finetune_operator.conditions import PHASES
from finetune_operator.observed import Job
from finetune_operator.port import Event

Told = tuple[Literal["Normal", "Warning"], str, str]
"""Type, reason and message."""


def events_between(job: Job, before: Status, after: Status) -> tuple[Event, ...]:
    """One Event for each transition. Its name follows from the status after it, so that two operators tell it once.

    An operator that ends between writing the status and telling of it tells nobody: the status is the truth, an Event is best effort.
    """
    return tuple(_event(job, after, told) for told in dict.fromkeys(_told(before, after)))


def _event(job: Job, status: Status, told: Told) -> Event:
    times = (condition.last_transition_time for condition in status.conditions)
    digest = hashlib.sha256("|".join((job.uid, str(status.attempt.number), *told, *times)).encode()).hexdigest()[:16]
    return Event(f"{job.name}.{digest}", *told)


def _told(before: Status, after: Status) -> Iterable[Told]:
    old, new = before.attempt, after.attempt
    if new.failures > old.failures and after.failure and not after.finished:
        yield "Warning", after.failure.reason, f"attempt {old.number} failed: {after.failure.message}"
    if new.preemptions > old.preemptions:
        yield "Warning", new.end_reason or Reason.PREEMPTED, f"attempt {old.number} was taken away: {new.end_message}"
    if new.number > old.number:
        resumed = before.suspended_time is not None
        reason = Reason.ACCEPTED if new.number == 1 else Reason.RESUMED if resumed else Reason.RETRYING
        yield "Normal", reason, f"attempt {new.number} begins"
    elif _workers_lost(before, after):
        yield "Warning", Reason.WORKERS_LOST, _words(after, "WorkersReady")
    yield from (("Warning", Reason.WARNED, warning) for warning in after.warnings if warning not in before.warnings)
    gates = after.condition("GatesPassed")
    if gates and gates.status == "True" and not _holds(before, "GatesPassed"):
        yield "Normal", gates.reason, gates.message
    quality, before_that = after.condition("Degraded"), before.condition("Degraded")
    told = quality and (quality.status, quality.reason) != (before_that and (before_that.status, before_that.reason))
    if quality and told and quality.reason != Reason.PENDING:
        yield "Warning" if quality.reason in ADVICE else "Normal", quality.reason, quality.message
    now = _reason(after)
    if now and now != _reason(before) and now not in _TOLD_OTHERWISE:
        yield "Warning" if now in ADVICE else "Normal", now, _words(after, "Ready")


_STAGES = tuple(reason for _, reason in PHASES.values())
_TOLD_OTHERWISE = (Reason.RETRYING, Reason.RESUMED, Reason.PENDING, Reason.WORKERS_LOST, *_STAGES)
"""Reasons of Ready that are no Events of their own: others say so, or status.stages, which has the times of each stage."""


def _reason(status: Status) -> str:
    ready = status.condition("Ready")
    return ready.reason if ready else ""


def _holds(status: Status, kind: Literal["GatesPassed"]) -> bool:
    condition = status.condition(kind)
    return condition is not None and condition.status == "True"


def _words(status: Status, kind: Literal["Ready", "WorkersReady"]) -> str:
    condition = status.condition(kind)
    return condition.message if condition else ""


def _workers_lost(before: Status, after: Status) -> bool:
    old, new = before.condition("WorkersReady"), after.condition("WorkersReady")
    if old is None or new is None or new.status != "False":
        return False
    # Workers that ran for a moment only may never have been told to run.
    return old.status == "True" or (new.reason == Reason.WORKERS_LOST and old.reason != Reason.WORKERS_LOST)
