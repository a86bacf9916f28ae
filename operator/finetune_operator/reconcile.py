"""The loop: read what is there, decide, write the status, bring the objects in line.

Level-triggered: nothing is remembered between two calls, so a call may be cut short anywhere, and the next one goes on.
"""

import logging
from dataclasses import replace
from datetime import datetime
from typing import Any

from finetune_api.report import Report
from finetune_api.status import Status
from finetune_operator.diagnosis import refusal as refused_for
from finetune_operator.lifecycle import advance
from finetune_operator.monitoring import acting
from finetune_operator.observed import Job, Observed, Waiting, job_from, observe, with_status
from finetune_operator.pace import SOON_SECONDS, expiry, next_look
from finetune_operator.plan import ANCHOR, belonging, desired_objects, missing, surplus
from finetune_operator.port import Cluster, Conflict, JobKey, Refused, TooLarge
from finetune_operator.profiles import offered
from finetune_operator.reported import without_details
from finetune_operator.requests import is_left_alone, next_limit
from finetune_operator.settings import Settings
from finetune_operator.transitions import events_between

CHANGES_PER_TURN = 100
"""Most objects that a turn makes, and most that it deletes: a job of a thousand workers must neither keep the others waiting
nor look as if it were stuck."""

TOO_LARGE_SECONDS = 60.0
"""How often it is tried to write the status of a job that is too large."""

log = logging.getLogger(__name__)


async def reconcile(key: JobKey, cluster: Cluster, settings: Settings, now: datetime, clock_set: datetime | None = None) -> float | None:
    """Bring one job a step further; the seconds until its next turn, or None where only an event can bring anything new.

    `clock_set` is when the clock that tells `now` was last found to have been set.
    """
    raw = await cluster.read(key)
    if raw is None:
        return None
    job = job_from(raw.job, local=settings.local)
    observed = replace(observe(job.name, job.uid, raw.pods, raw.config_maps, raw.events), clock_set=clock_set, looked=raw.looked)
    if is_left_alone(job, now):
        return await _leave_alone(cluster, raw.job, job, observed, settings, now)
    observed = replace(observed, report=await _report(cluster, job, observed, settings), offered=offered(raw.profiles))
    try:
        stored, status = await _decide(cluster, raw.job, job, observed, settings, now)
        job = with_status(job, status, local=settings.local)
        refusal = await _act(cluster, job, acting(status), observed, settings, now)
        if refusal:
            observed = replace(observed, refusal=refusal)
            _, status = await _decide(cluster, stored, job, observed, settings, now)
    except Conflict:
        return min(SOON_SECONDS, settings.poll_seconds)
    except TooLarge as error:
        return await _let_go(cluster, job, observed, settings, str(error))
    if (end := expiry(job.spec, status)) and now >= end and not job.deleting:
        await cluster.delete_job(raw.job)
    return next_look(job, acting(status), observed, settings, now)


async def _let_go(cluster: Cluster, job: Job, observed: Observed, settings: Settings, why: str) -> float:
    """Delete the pods of a job that has no room for its state: no limit of its own or of its profile could be kept any more."""
    going = tuple(pod for pod in observed.alive if pod.deletion is None)
    log.error("nothing can be said of the job, so its %d pods go: %s", len(going), why)
    for pod in going[:CHANGES_PER_TURN]:
        await cluster.delete("Pod", job.namespace, pod.name, uid=pod.uid)
    return TOO_LARGE_SECONDS


async def _leave_alone(
    cluster: Cluster, raw: dict[str, Any], job: Job, observed: Observed, settings: Settings, now: datetime
) -> float | None:
    """Say that nothing is done, and do nothing: the end of the pause is an event, unless it is that the profile grants no more."""
    try:
        _, status = await _decide(cluster, raw, job, observed, settings, now)
    except Conflict:
        return min(SOON_SECONDS, settings.poll_seconds)
    except TooLarge as error:
        return await _let_go(cluster, job, observed, settings, str(error))
    return next_limit(with_status(job, status, local=settings.local), observed, settings, now)


async def _report(cluster: Cluster, job: Job, observed: Observed, settings: Settings) -> Report | None:
    """What the current head says now."""
    number = acting(job.status).attempt.number
    head = observed.head(number)
    if head is None or head.ip is None or head.phase != "Running":
        return None
    return await cluster.fetch_report(head, settings.token(job.uid, number), after=0, wait=0.0)


async def _decide(
    cluster: Cluster, raw: dict[str, Any], job: Job, observed: Observed, settings: Settings, now: datetime
) -> tuple[dict[str, Any], Status]:
    """Write the status that follows, before anything is done: who comes after a crash knows what was begun. Raises Conflict."""
    status = advance(job, observed, settings, now)
    if status != job.status:
        try:
            raw = await cluster.patch_status(raw, status)
        except TooLarge as error:
            log.warning("the status is written without what the head tells: %s", error)
            status = without_details(status)
            raw = await cluster.patch_status(raw, status)
        for event in events_between(job, job.status, status):
            log.info("%s: %s", event.reason, event.message)
            await cluster.emit(raw, event)
    return raw, status


async def _act(cluster: Cluster, job: Job, status: Status, observed: Observed, settings: Settings, now: datetime) -> Waiting | None:
    """Make what is missing and delete what is surplus, a part of it at a time; the API server's words where it refuses an object."""
    # What a deleted job owns goes with it, but its pods must not hold GPUs while somebody's finalizer holds up the job itself.
    desired = () if job.deleting else desired_objects(job, status, settings)
    refusal, anchor = None, None
    try:
        for manifest in missing(desired, status, observed)[:CHANGES_PER_TURN]:
            uid = await cluster.apply(belonging(manifest, anchor))
            anchor = uid if manifest["kind"] == ANCHOR else anchor
    except Refused as error:
        log.warning("refused: %s", error)
        refusal = refused_for(error.message)
    for removal in surplus(desired, job, status, observed, settings, now)[:CHANGES_PER_TURN]:
        if removal.labels is not None:
            await cluster.delete_pods(job.namespace, removal.labels, grace=removal.grace)
        else:
            await cluster.delete(removal.kind, job.namespace, removal.name, uid=removal.uid, grace=removal.grace)
    return refusal
