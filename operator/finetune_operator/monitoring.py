"""After the release: when the published model is measured again, what became of it, and whether it is degraded. Pure.

A measuring run has its own number, after those of the attempts, and its own pods, named like theirs. It is not tried again: a run that
fails, or does not end in time, leaves the condition Degraded Unknown, and the next one comes on schedule. The job itself stays Complete
whatever happens here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

from cronsim import CronSim, CronSimError

from finetune_api.evaluation import LOWER_IS_BETTER
from finetune_api.figures import figure, interval
from finetune_api.monitoring import MonitoringPlan, measured_again
from finetune_api.monitoring_status import FreshFigure, MonitoredResult, MonitoringRun, MonitoringStatus, RunFailure
from finetune_api.reasons import ADVICE, Reason
from finetune_api.status import TEXT_MAX, Attempt, Condition, Status
from finetune_api.v1alpha1 import Spec
from finetune_operator.budget import SECONDS_PER_HOUR
from finetune_operator.failures import ending_of, head_lost
from finetune_operator.look import Look, crew_of, too_soon, waiting_of, waiting_since
from finetune_operator.observed import Job, Observed, head_name
from finetune_operator.settings import Settings
from finetune_operator.times import later, not_before, rfc3339

Truth = Literal["True", "False", "Unknown"]

RUN_SECONDS_MIN, RUN_SECONDS_MAX = 6 * 3600, 24 * 3600
"""Bounds of what a schedule leaves to a run: one that comes every minute is no reason to end a run of an hour, and pods that hang hold
their GPUs for nothing."""


def next_time(schedule: str, after: datetime) -> datetime | None:
    """When the schedule comes next after a time, in UTC; None where it never does."""
    try:
        return next(CronSim(schedule, after.astimezone(UTC)))
    except (CronSimError, StopIteration):
        return None


def run_deadline(spec: Spec, plan: MonitoringPlan, since: datetime) -> tuple[datetime, str]:
    """When a run that no queue has held back since then must have ended, and what says so, for people.

    A run has the time between two of the schedule's times, at least RUN_SECONDS_MIN and at most RUN_SECONDS_MAX, and never more than
    activeDeadlineSeconds: to measure a model takes less than to tune it.
    """
    first = next_time(plan.schedule, since)
    second = next_time(plan.schedule, first) if first else None
    between = int((second - first).total_seconds()) if first and second else RUN_SECONDS_MAX
    seconds, words = min(max(between, RUN_SECONDS_MIN), RUN_SECONDS_MAX), "the {} s that its schedule leaves to it"
    if spec.active_deadline_seconds is not None and spec.active_deadline_seconds < seconds:
        seconds, words = spec.active_deadline_seconds, "activeDeadlineSeconds ({})"
    return since + timedelta(seconds=seconds), words.format(seconds)


def acting(status: Status) -> Status:
    """The status as those see it who make pods and ask heads: after the release the last measuring run stands in the attempt's place."""
    run = status.monitoring.run if status.monitoring else None
    if run is None or not status.finished:
        return status
    attempt = Attempt(
        number=run.number, start_time=run.start_time, end_time=run.end_time, waiting_time=run.waiting_time, head_seen=run.head_seen
    )
    return status.model_copy(update={"attempt": attempt, "workers_wanted": run.workers_wanted})


def monitored(job: Job, spec: Spec, observed: Observed, settings: Settings, now: datetime) -> Status:
    """The status that follows for a job that has ended."""
    status, plan = job.status, spec.monitoring
    complete = status.condition("Complete")
    released = complete is not None and complete.status == "True" and bool(status.artifacts)
    if plan is None or not released:
        return with_refusal(_without(status), job.left_out if released else "", status.condition("Degraded"), now)
    found = status.monitoring or MonitoringStatus()
    watch = _Watch(job, spec, plan, observed, settings, now)
    run = found.run
    found = watch.under_way(found, run) if run is not None and run.running else watch.at_rest(found)
    found = found.model_copy(update={"results": tuple(judged(each, plan) for each in found.results)})
    return _stated(status.model_copy(update={"monitoring": found}), *degraded(found), status.condition("Degraded"), now)


def with_refusal(status: Status, why: str, before: Condition | None, now: datetime) -> Status:
    """The status that tells why spec.monitoring has no effect, where there is a reason: a user who has asked for it hears of it.

    `before` is the condition Degraded as it was.
    """
    if not why:
        return status
    message = f"nothing is measured after the release: {why}"
    return _stated(status, "Unknown", Reason.PROFILE_VIOLATED, message, before, now)


def _stated(status: Status, truth: Truth, reason: Reason, message: str, before: Condition | None, now: datetime) -> Status:
    """The status with the condition Degraded."""
    condition = Condition(
        type="Degraded",
        status=truth,
        observed_generation=max(status.observed_generation, 0),
        last_transition_time=before.last_transition_time if before and before.status == truth else rfc3339(now),
        reason=reason,
        message=message[:TEXT_MAX],
    )
    others = tuple(each for each in status.conditions if each.type != "Degraded")
    return status.model_copy(update={"conditions": (*others, condition)})


def _without(status: Status) -> Status:
    """Nothing is measured, or no longer."""
    others = tuple(each for each in status.conditions if each.type != "Degraded")
    return status.model_copy(update={"monitoring": None, "conditions": others})


@dataclass(frozen=True)
class _Watch:
    """One look at a job whose published model is measured again."""

    job: Job
    spec: Spec
    plan: MonitoringPlan
    observed: Observed
    settings: Settings
    now: datetime

    def at_rest(self, found: MonitoringStatus) -> MonitoringStatus:
        """No run is under way: one begins when its time has come and the pods before it have gone."""
        if (held := self._held()) is not None:
            return found.model_copy(update={"next_run_time": None, "message": held})
        if found.next_run_time is None or found.schedule != self.plan.schedule:
            return self._scheduled(found)
        if self.now < later(found.next_run_time, 0):
            return found
        number = max(self.job.status.attempt.number, found.run.number if found.run else 0) + 1
        if self.observed.alive or any(pod.attempt == number for pod in self.observed.pods):
            return found
        begun = rfc3339(self.now)
        run = MonitoringRun(number=number, start_time=begun, active_time=begun, waiting_time=begun)
        return found.model_copy(update={"run": run, "next_run_time": None, "message": f"run {number} is under way"})

    def under_way(self, found: MonitoringStatus, run: MonitoringRun) -> MonitoringStatus:
        """A run goes on, or ends: with figures, without, or because the user wants its pods away."""
        if self.spec.suspend:
            return self._ended(found, run).model_copy(update={"next_run_time": None})
        report = self.observed.report_of(self.job.uid, run.number)
        if report is not None and report.outcome == "Succeeded":
            return self._measured(found, run, report.fresh)
        head = self.observed.head(run.number)
        if (head is None and run.head_seen) or (head is not None and head.finished):
            ending = ending_of(head, report, "Evaluate") if head else head_lost(head_name(self.job.name, run.number))
            return self._failed(found, run, ending.reason, ending.message)
        wanted = min(report.workers_wanted, self.spec.compute.workers.max) if report else run.workers_wanted
        look = self._look(run.model_copy(update={"workers_wanted": wanted}))
        since, waiting = waiting_since(look), waiting_of(look)
        active = None if crew_of(look).gated else run.active_time or rfc3339(self.now)
        if (beyond := self._beyond(run, active)) is not None:
            return self._failed(found, run, *beyond)
        seconds = self.spec.pre_running_deadline_seconds
        if since is not None and self.now >= later(since, seconds) and not too_soon(self.observed, seconds):
            why = waiting.message if waiting else found.message
            limit = f"within preRunningDeadlineSeconds ({seconds})"
            return self._failed(found, run, Reason.PRE_RUNNING_DEADLINE_EXCEEDED, f"{limit}: {why}")
        seen = run.head_seen or head is not None
        going = run.model_copy(update={"workers_wanted": wanted, "active_time": active, "waiting_time": since, "head_seen": seen})
        # A refusal is known only in the turn that was refused: its words stay until the pod is there.
        message = waiting.message if waiting else found.message if head is None else f"run {run.number} is under way"
        return found.model_copy(update={"run": going, "message": message[:TEXT_MAX]})

    def _beyond(self, run: MonitoringRun, active: str | None) -> tuple[Reason, str] | None:
        """Which limit a run has come to that no queue has held back since `active`, in a word and in words."""
        if (held := self._held()) is not None:
            return Reason.BUDGET_EXCEEDED, f"run {run.number} was ended: {held}"
        if active is None:
            return None
        latest, words = run_deadline(self.spec, self.plan, later(active, 0))
        return (Reason.DEADLINE_EXCEEDED, f"run {run.number} has not ended within {words}") if self.now >= latest else None

    def _held(self) -> str | None:
        """Why no run may begin: the user wants it suspended, or the workers that it needs have used their GPU-hours up."""
        if self.spec.suspend:
            return "suspended" if self.settings.local else "suspended: set spec.suspend to false to go on"
        limit, usage = self.spec.max_gpu_hours, self.job.status.usage
        if limit is None or usage is None or self.plan.endpoint is not None or usage.gpu_seconds < limit * SECONDS_PER_HOUR:
            return None
        return f"maxGpuHours ({limit:g}) is used up: raise or remove spec.maxGpuHours to go on"

    def _look(self, run: MonitoringRun) -> Look:
        """The look at the run as at an attempt."""
        job = replace(self.job, status=acting(self.job.status))
        after = job.status.model_copy(update={"workers_wanted": run.workers_wanted})
        return Look(job, self.spec, after, self.observed, self.settings, self.now)

    def _scheduled(self, found: MonitoringStatus) -> MonitoringStatus:
        """The next time that the schedule names: of those that have passed none, so that a long absence is made up for once."""
        time = next_time(self.plan.schedule, self.now)
        words = f"the next run begins at {rfc3339(time)}" if time else f"the schedule {self.plan.schedule} names no time that ever comes"
        return found.model_copy(update={"schedule": self.plan.schedule, "next_run_time": time and rfc3339(time), "message": words})

    def _ended(self, found: MonitoringStatus, run: MonitoringRun, changes: Mapping[str, object] | None = None) -> MonitoringStatus:
        ended = run.model_copy(update={"end_time": not_before(self.now, run.start_time), "waiting_time": None, "workers_wanted": 0})
        return self._scheduled(found.model_copy(update={"run": ended, **(changes or {})}))

    def _measured(self, found: MonitoringStatus, run: MonitoringRun, figures: Iterable[FreshFigure]) -> MonitoringStatus:
        """The figures that were asked for, each once: the head is a tenant's pod."""
        asked = {f"{suite}/{metric}": None for suite, metrics in measured_again(self.spec).items() for metric in metrics}
        known = {each.metric: each for each in figures if each.metric in asked}
        if not known:
            return self._failed(found, run, Reason.EVALUATION_FAILED, f"run {run.number} ended without a figure")
        evaluation = self.job.status.evaluation
        released = {each.metric: each.value for each in (evaluation.results if evaluation else ())}
        results = tuple(MonitoredResult(**known[name].model_dump(), released=released.get(name)) for name in asked if name in known)
        told = {"runs": found.runs + 1, "results": results, "last_run_time": rfc3339(self.now), "failure": None}
        return self._ended(found, run, told)

    def _failed(self, found: MonitoringStatus, run: MonitoringRun, reason: Reason, message: str) -> MonitoringStatus:
        failure = RunFailure(reason=reason, message=message[:TEXT_MAX], hint=ADVICE[reason].hint, pod=head_name(self.job.name, run.number))
        told = {"failed_runs": found.failed_runs + 1, "last_run_time": rfc3339(self.now), "failure": failure}
        return self._ended(found, run, told)


def judged(result: MonitoredResult, plan: MonitoringPlan) -> MonitoredResult:
    """A fresh figure held against the released one."""
    allowed, value, released = plan.worse_by(result.metric), result.value, result.released
    difference = value - released if value is not None and released is not None else None
    verdict: Literal["Held", "Degraded", "Inconclusive"] | None = None
    if allowed is not None and value is not None and released is not None:
        falls = result.metric.rpartition("/")[2] in LOWER_IS_BETTER
        bound = released + allowed if falls else released - allowed
        best = result.low if falls else result.high
        if not _worse(value, bound, falls=falls):
            verdict = "Held"
        else:
            verdict = "Degraded" if best is not None and _worse(best, bound, falls=falls) else "Inconclusive"
    return result.model_copy(update={"difference": difference, "verdict": verdict})


def _worse(value: float, bound: float, *, falls: bool) -> bool:
    return value > bound if falls else value < bound


def degraded(found: MonitoringStatus) -> tuple[Truth, Reason, str]:
    """The condition Degraded: its status, reason and message. What is inconclusive says nothing against the model."""
    if found.failure is not None:
        return "Unknown", Reason(found.failure.reason), found.failure.message
    if not found.runs:
        return "Unknown", Reason.PENDING, "the published model has not been measured since its release"
    by_verdict = {name: [each for each in found.results if each.verdict == name] for name in ("Degraded", "Inconclusive", "Held")}
    if worse := by_verdict["Degraded"]:
        return "True", Reason.DEGRADED, "; ".join(_told(each) for each in worse)
    count = sum(len(each) for each in by_verdict.values())
    if not count:
        return "Unknown", Reason.EVALUATION_FAILED, "no metric that is judged has a figure both on fresh data and at the release"
    words = f"{len(by_verdict['Held'])} of {count} metrics held"
    unclear = "; ".join(f"{_told(each)}, inconclusive" for each in by_verdict["Inconclusive"])
    return "False", Reason.QUALITY_HELD, f"{words}; {unclear}" if unclear else words


def _told(result: MonitoredResult) -> str:
    return f"{result.metric}: {figure(result.value)}{interval(result.low, result.high)}, released with {figure(result.released)}"
