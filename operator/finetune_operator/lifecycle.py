"""What a job's status becomes, given its spec, what is observed and the time. Pure; everything that is remembered stands in the status.

An attempt begins, runs, and ends: by success, failure, preemption or suspension. Its objects exist while it runs (`plan`). The next
attempt begins when it may and the pods of the one before have gone, so no two attempts write to one storage.
CHECKS, in their order, say when which of this happens.
"""

from dataclasses import replace
from datetime import datetime
from typing import Any

from finetune_api.figures import gates_in_words
from finetune_api.reasons import Reason
from finetune_api.status import TEXT_MAX, Resolved, Status
from finetune_operator.admission import admission, awaiting_profile
from finetune_operator.budget import hold_of
from finetune_operator.conditions import PHASES, Summary, conditions_of
from finetune_operator.endings import counted, done, end, failed, finish, let_in, rested, too_far
from finetune_operator.failures import ending_of, explained, failure, head_lost
from finetune_operator.gang_checks import gang_is_whole, gang_lost, held_back, queued
from finetune_operator.headway import stalled, with_last_step
from finetune_operator.look import Check, Look, Verdict, crew_of, too_soon, unheard, waiting_of, waiting_since
from finetune_operator.monitoring import monitored, with_refusal
from finetune_operator.observed import Job, Observed, head_name, with_status
from finetune_operator.pace import deadline, paced
from finetune_operator.profiles import as_offered
from finetune_operator.reported import current_stage, with_report
from finetune_operator.requests import canceled, canceling, is_left_alone, noted, paused, revival
from finetune_operator.settings import Settings
from finetune_operator.times import later, rfc3339
from finetune_operator.usage import with_gpu_seconds
from finetune_operator.worker_deaths import remembered

_STEPS = 8
"""More changes of state than one look at a job can bring about."""


def advance(job: Job, observed: Observed, settings: Settings, now: datetime) -> Status:
    """The status that follows. Given the same observation and time, the status that follows on that is the same one."""
    if job.deleting:
        return job.status
    status = job.status
    for _ in range(_STEPS):
        step = _step(with_status(job, status, local=settings.local), observed, settings, now)
        if step == status:
            return paced(job.status, status, settings, now)
        status = step
    raise RuntimeError(f"the state of {job.namespace}/{job.name} does not settle")


def _step(job: Job, observed: Observed, settings: Settings, now: datetime) -> Status:
    if job.status.finished:
        again, status = revival(job, now), with_gpu_seconds(job.status, observed, now)
        if again is not None:
            return _conclude(job, status, again, now)
        seen = _seen(status, job.generation)
        return (
            seen if job.spec is None or is_left_alone(job, now) else monitored(replace(job, status=seen), job.spec, observed, settings, now)
        )
    job = replace(job, status=noted(job))
    if job.spec is None:
        return _conclude(job, job.status, _invalid(job, now), now)
    report = None if is_left_alone(job, now) else observed.report_of(job.uid, job.status.attempt.number)
    status = with_report(job.status, report, job.spec) if report else job.status
    status = with_last_step(job.status, status, report, now, observed.clock_set)
    status = with_gpu_seconds(status, observed, now)
    look = Look(job, job.spec, status, observed, settings, now)
    verdict = next(verdict for check in CHECKS if (verdict := check(look)) is not None)
    return _conclude(job, status, verdict, now)


# The checks. The first that finds something decides.


def succeeded(look: Look) -> Verdict | None:
    """The trainer has published the result: nothing that happens afterwards takes that back."""
    report = look.observed.report_of(look.job.uid, look.attempt.number)
    if report is None or report.outcome != "Succeeded":
        return None
    if report.sufficient and look.spec.baseline is not None and look.spec.baseline.sufficient_if is not None:
        words = report.message or "a prompt alone reaches baseline.sufficientIf"
        return Verdict(Summary("Complete", Reason.BASELINE_SUFFICIENT, words), finish(look.status, look.now))
    if look.spec.plan_only:
        return Verdict(Summary("Complete", Reason.PLANNED, report.message or "see status.plan"), done(look.status, look.now))
    if (refused := _not_passed(look)) is not None:
        return refused
    summary = Summary("Complete", Reason.SUCCEEDED, report.message or "the result is published")
    return Verdict(summary, done(look.status, look.now))


def _not_passed(look: Look) -> Verdict | None:
    """The head is a tenant's pod: where its own figures say that a gate is not passed, the job is no success, whatever it says besides."""
    evaluation = look.status.evaluation
    verdict = evaluation.gates_verdict if evaluation and look.spec.evaluation.gates else None
    if evaluation is None or verdict in (None, "Passed"):
        return None
    reason = Reason.GATES_NOT_PASSED if verdict == "Failed" else Reason.GATES_INCONCLUSIVE
    return failed(look, reason, gates_in_words(evaluation))


def suspending(look: Look) -> Verdict | None:
    """The user wants the pods away, or the budget does: the attempt ends, and its pods get the time to save a checkpoint."""
    hold = hold_of(look)
    if hold is None or not (look.attempt.running or look.observed.alive):
        return None
    summary = Summary(look.status.phase or "Pending", hold.reason, hold.going)
    return Verdict(summary, end(look, hold.reason, summary.message) if look.attempt.running else {})


def suspended(look: Look) -> Verdict | None:
    """The pods have gone, and stay away until the user wants them back."""
    hold = hold_of(look)
    if hold is None:
        return None
    since = look.status.suspended_time or rfc3339(look.now)
    changes = {"suspended_time": since, "workers_wanted": 0, "workers_ready": 0}
    return Verdict(Summary("Suspended", hold.reason, hold.gone), changes)


def resumed(look: Look) -> Verdict | None:
    """The user wants the pods back. The time of the suspension is added up, since activeDeadlineSeconds does not count it."""
    if look.status.suspended_time is None:
        return None
    changes = {"suspended_time": None, **rested(look.status, look.status.suspended_time, look.now)}
    return Verdict(Summary("Pending", Reason.RESUMED, "going on from the last checkpoint"), changes)


def deadline_exceeded(look: Look) -> Verdict | None:
    """The job as a whole has taken longer than its user allows."""
    if (latest := deadline(look.spec, look.status)) is None or look.now < latest:
        return None
    seconds = look.spec.active_deadline_seconds
    return failed(look, Reason.DEADLINE_EXCEEDED, f"the job has not ended within activeDeadlineSeconds ({seconds})")


def head_ended(look: Look) -> Verdict | None:
    """The head is the attempt: with it, the attempt ends. Lost workers alone do not end it, since Ray Train goes on with new ones."""
    attempt = look.attempt
    head = look.observed.head(attempt.number)
    if not attempt.running or (head is None and not attempt.head_seen) or (head is not None and not head.finished):
        return None
    stage = current_stage(look.status.stages)
    report = look.observed.report_of(look.job.uid, attempt.number)
    ending = ending_of(head, report, stage) if head else head_lost(head_name(look.job.name, attempt.number))
    return counted(look, explained(ending, remembered(look).worker_failure))


def never_ran(look: Look) -> Verdict | None:
    """The pods that the attempt needs have not come to run: fail, so that those that do run let go of their GPUs."""
    since = waiting_since(look)
    if not look.attempt.running or since is None or look.now < later(since, look.spec.pre_running_deadline_seconds):
        return None
    if too_soon(look.observed, look.spec.pre_running_deadline_seconds):
        return None
    waiting = waiting_of(look)
    if waiting and waiting.reason is not Reason.UNSCHEDULABLE:
        return failed(look, waiting.reason, waiting.message)
    why = waiting.message if waiting else _why_not(look)
    message = f"within preRunningDeadlineSeconds ({look.spec.pre_running_deadline_seconds}): {why}"
    return failed(look, Reason.PRE_RUNNING_DEADLINE_EXCEEDED, message)


def _why_not(look: Look) -> str:
    if (head := unheard(look)) is None:
        return "the pods did not start"
    where = f"pod {head.name} runs, but does not answer the operator on port {look.settings.report_port}"
    return f"{where}: let the operator reach it (NetworkPolicies, a mesh, a firewall)"


def between_attempts(look: Look) -> Verdict | None:
    """The next attempt waits for the pods of the one before, and after a failure for some time."""
    if look.attempt.running or look.attempt.number == 0:
        return None
    after = f"attempt {look.attempt.number} ended ({look.attempt.end_reason}: {look.attempt.end_message})"
    if look.observed.alive:
        return Verdict(Summary("Pending", Reason.RETRYING, f"{after}; its pods are going"))
    if look.attempt.retry_time and look.now < later(look.attempt.retry_time, 0) and not too_far(look):
        return Verdict(Summary("Pending", Reason.RETRYING, f"{after}; the next begins at {look.attempt.retry_time}"))
    return None


def beginning(look: Look) -> Verdict | None:
    """Nothing stands in the way of the next attempt. It goes on from the newest checkpoint of the job."""
    if look.attempt.running:
        return None
    attempt = look.attempt.model_copy(
        update={
            "number": look.attempt.number + 1,
            "start_time": rfc3339(look.now),
            "waiting_time": rfc3339(look.now),
            "end_time": None,
            "retry_time": None,
            "head_seen": False,
            "gangs": 0,
            "gang_seen": False,
            "worker_failure": None,
            "earlier_lost_steps": look.attempt.lost_steps,
        }
    )
    resolved = look.status.resolved or Resolved()
    image = resolved.trainer_image or as_offered(look.settings, look.status).trainer_image
    changes = {
        "attempt": attempt,
        "stages": (),
        "workers_wanted": 0,
        "workers_ready": 0,
        "earlier_usage": look.status.usage,
        # The same number in an attempt before this one was another step.
        "progress": look.status.progress and look.status.progress.model_copy(update={"last_step_time": None}),
        # A job keeps the trainer that it began with, whatever the operator is upgraded to meanwhile.
        "resolved": resolved.model_copy(update={"trainer_image": image}),
    }
    return Verdict(Summary("Pending", Reason.PENDING, "the head pod is to start"), changes)


def running(look: Look) -> Verdict:
    """The attempt goes on."""
    attempt, status, crew = look.attempt, look.status, crew_of(look)
    seen = attempt.head_seen or look.observed.head(attempt.number) is not None
    noted = {"head_seen": seen, "gang_seen": attempt.gang_seen or gang_is_whole(look), "waiting_time": waiting_since(look)}
    changes: dict[str, Any] = {"workers_ready": crew.ready, "attempt": remembered(look).model_copy(update=noted)}
    waiting = waiting_of(look)
    stage = current_stage(status.stages)
    phase, reason = PHASES[stage] if stage else ("Pending", Reason.PENDING)
    if crew.gated:
        return Verdict(Summary("Queued", Reason.QUEUED, held_back(look), waiting, crew.needed), {**changes, **queued(look)})
    changes |= let_in(status, look.now)
    if crew.complete:
        report = look.observed.report_of(look.job.uid, attempt.number)
        if unheard(look) is not None:
            return Verdict(Summary(phase, reason, "the head pod runs, and has yet to answer the operator", waiting, crew.needed), changes)
        live = report.message if report else status.message
        return Verdict(Summary(phase, reason, phase.lower(), waiting, crew.needed), changes, live=live or phase.lower())
    if waiting:
        return Verdict(Summary(phase, waiting.reason, waiting.message, waiting, crew.needed), changes)
    words = f"{crew.ready} of {status.workers_wanted} workers run" if crew.head else "the head pod is starting"
    return Verdict(Summary(phase, reason, words, None, crew.needed), changes)


CHECKS: tuple[Check, ...] = (
    paused,
    succeeded,
    canceling,
    canceled,
    admission,
    suspending,
    suspended,
    resumed,
    deadline_exceeded,
    head_ended,
    gang_lost,
    never_ran,
    stalled,
    between_attempts,
    awaiting_profile,
    beginning,
    running,
)
"""A job that is being deleted, has ended, or has a spec that cannot be understood does not come this far."""


# What the checks are made of.


def _seen(status: Status, generation: int) -> Status:
    """An ended job keeps everything but its monitoring, whatever its user changes; that the change was seen is said."""
    conditions = tuple(condition.model_copy(update={"observed_generation": generation}) for condition in status.conditions)
    return status.model_copy(update={"observed_generation": generation, "conditions": conditions})


def _invalid(job: Job, now: datetime) -> Verdict:
    """The API server took what this operator does not understand: an older CRD, or a rule that CEL cannot state."""
    why = failure(Reason.INVALID_SPEC, job.problem)
    return Verdict(Summary("Failed", Reason.INVALID_SPEC, why.message), {"failure": why, **finish(job.status, now)})


def _conclude(job: Job, status: Status, verdict: Verdict, now: datetime) -> Status:
    summary = verdict.summary
    told = status.model_copy(
        update={
            "observed_generation": job.generation,
            "phase": summary.phase,
            "message": (verdict.live or summary.message)[:TEXT_MAX],
            "start_time": status.start_time or rfc3339(now),
            **verdict.changes,
        }
    )
    gated = job.spec is not None and bool(job.spec.evaluation.gates)
    stated = told.model_copy(update={"conditions": conditions_of(told, replace(summary, gates=gated), now)})
    return with_refusal(stated, job.left_out if summary.phase != "Failed" else "", status.condition("Degraded"), now)
