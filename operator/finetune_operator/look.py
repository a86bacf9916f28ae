"""What a check of a job's life cycle looks at, and what it says: the look, the verdict, the pods that run and those waited for. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_api.reasons import Reason
from finetune_api.status import Attempt, Status
from finetune_api.v1alpha1 import Spec
from finetune_operator.conditions import Summary
from finetune_operator.diagnosis import REFUSALS
from finetune_operator.failures import death_of
from finetune_operator.gangs import gang_size, members
from finetune_operator.observed import Job, Observed, Pod, Waiting
from finetune_operator.settings import Settings
from finetune_operator.times import in_order, rfc3339

SETTLE_SECONDS = 300.0
"""After a time in which the operator was away, or without the API server."""


@dataclass(frozen=True)
class Look:
    """One look at a job: all that a check may consider."""

    job: Job
    spec: Spec
    status: Status
    """The stored status, with what the trainer has reported since."""
    observed: Observed
    settings: Settings
    now: datetime

    @property
    def attempt(self) -> Attempt:
        """The current attempt."""
        return self.status.attempt


@dataclass(frozen=True)
class Verdict:
    """What a check found: the job's state in brief, and the fields of the status that change."""

    summary: Summary
    changes: Mapping[str, Any] = field(default_factory=dict)
    live: str | None = None
    """What the trainer says it is doing, in place of the summary's message."""


Check = Callable[[Look], Verdict | None]


@dataclass(frozen=True)
class Crew:
    """The pods that run of those that the attempt needs now."""

    head: bool
    ready: int
    needed: int
    gated: bool
    """A queue holds back pods that are needed."""

    @property
    def complete(self) -> bool:
        """Whether the attempt can do what it is at."""
        return self.head and self.ready >= self.needed


def crew_of(look: Look) -> Crew:
    """The pods of the current attempt, counted."""
    head, workers = look.observed.head(look.attempt.number), look.observed.workers(look.attempt.number)
    wanted = look.status.workers_wanted
    needed = gang_size(look.spec, wanted)
    return Crew(
        head=head is not None and head.phase == "Running",
        ready=sum(pod.running for pod in workers) if wanted else 0,
        needed=needed,
        gated=any(pod.gated for pod in (head, *members(look.observed, look.attempt.number, needed)) if pod),
    )


def unheard(look: Look) -> Pod | None:
    """The head where it runs and has not said a word in this attempt: nobody can know what it needs."""
    head = look.observed.head(look.attempt.number)
    return head if head is not None and head.running and not look.status.stages else None


def waiting_since(look: Look) -> str | None:
    """Since when pods, or the head's first word, have been waited for; None where they are not, or a queue decides.

    The operator may have been away in between: what is missing now counts, and the wait for workers begins when they are seen to be wanted,
    or the training to have gone on; that for the head's word when it was started. No wait is measured across a clock that was set.
    """
    crew, silent = crew_of(look), unheard(look)
    if crew.gated or (crew.complete and silent is None):
        return None
    newly_wanted = look.status.workers_wanted > 0 and look.job.status.workers_wanted == 0
    since, before = look.attempt.waiting_time, look.status.condition("Ready")
    unasked = silent is not None and before is not None and before.reason == Reason.PAUSED
    if newly_wanted or since is None or unasked or _went_on(look) or not in_order(since, look.now, look.observed.clock_set):
        return rfc3339(look.now)
    return max(since, rfc3339(silent.started)) if silent is not None and silent.started else since


def too_soon(observed: Observed, seconds: float) -> bool:
    """Whether the operator has not looked for long enough to judge that something did not happen within so many seconds.

    While it could not look nobody made what was missing, and nobody asked the head: both have SETTLE_SECONDS before it counts.
    """
    return observed.looked is not None and observed.looked < min(SETTLE_SECONDS, seconds)


def _went_on(look: Look) -> bool:
    """Whether steps were taken that were not known yet: all pods that it needs ran after the last look."""
    before, after = look.job.status.progress, look.status.progress
    return after is not None and after.step > (before.step if before else 0)


def waiting_of(look: Look) -> Waiting | None:
    """Why wanted pods do not run. A refusal holds until the refused pods are there, so that it does not come and go with each try."""
    number, observed = look.attempt.number, look.observed
    head, workers = observed.head(number), observed.workers(number)
    for pod in (head, *workers):
        if pod and pod.waiting:
            return pod.waiting
    if look.status.workers_wanted and (ended := next((pod for pod in workers if pod.finished), None)):
        return _worker_ended(ended)
    if crew_of(look).complete:
        return None  # An elastic job that has enough workers does without those that are refused.
    if observed.refusal:
        return observed.refusal
    before = look.status.condition("Reconciling")
    absent = head is None or len(workers) < look.status.workers_wanted
    if absent and before and before.reason in REFUSALS and look.attempt.running:
        return Waiting(Reason(before.reason), before.message)
    return None


def _worker_ended(pod: Pod) -> Waiting:
    """Said before the pod is replaced, since its words go with it."""
    if pod.disruption:
        return Waiting(Reason.WORKERS_LOST, f"pod {pod.name} ended ({pod.disruption.words}) and is made anew")
    death = death_of(pod)
    why = pod.message or (f"{pod.exit.reason}, exit code {pod.exit.code}" if pod.exit else pod.phase)
    return Waiting(Reason(death.reason) if death else Reason.WORKERS_LOST, f"pod {pod.name} ended ({why}) and is made anew")
