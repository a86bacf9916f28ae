"""The conditions of a status: one fact each, in the words of Kubernetes' conventions. Pure.

A fact is stated anew each time; its `lastTransitionTime` moves only when its status does. Words that change with every step of
the training stay out of conditions, so that progress alone does not touch them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from finetune_api.figures import gates_in_words
from finetune_api.reasons import Reason
from finetune_api.status import TEXT_MAX, Condition, ConditionType, Phase, StageName, Status, Verdict
from finetune_operator.observed import Waiting
from finetune_operator.times import rfc3339

PHASES: dict[StageName, tuple[Phase, Reason]] = {
    "Prepare": ("Preparing", Reason.PREPARING),
    "Baseline": ("Baseline", Reason.MEASURING_BASELINE),
    "Search": ("Searching", Reason.SEARCHING),
    "Train": ("Training", Reason.TRAINING),
    "Evaluate": ("Evaluating", Reason.EVALUATING),
    "Publish": ("Publishing", Reason.PUBLISHING),
}
"""What a job is doing in each stage."""

_STAGE_FACTS: tuple[tuple[ConditionType, StageName], ...] = (
    ("DataReady", "Prepare"),
    ("Trained", "Train"),
    ("Evaluated", "Evaluate"),
    ("Published", "Publish"),
)


@dataclass(frozen=True)
class Summary:
    """What is true of the job as a whole, from which most conditions follow."""

    phase: Phase
    reason: Reason
    message: str
    workers: Waiting | None = None
    """Why wanted workers do not run."""
    workers_needed: int = 0
    """With fewer workers the training does not start."""
    gates: bool = False
    """Whether the spec has gates."""


@dataclass(frozen=True)
class _Fact:
    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""


def conditions_of(status: Status, summary: Summary, now: datetime) -> tuple[Condition, ...]:
    """All conditions of a job whose other status fields are set."""
    return tuple(_condition(fact, status, now) for fact in _facts(status, summary))


def _condition(fact: _Fact, status: Status, now: datetime) -> Condition:
    before = status.condition(fact.type)
    generation, message = max(status.observed_generation, 0), fact.message[:TEXT_MAX]
    same = before is not None and before.status == fact.status
    if before and same and (before.observed_generation, before.reason, before.message) == (generation, fact.reason, message):
        return before  # As nearly always: to make and check an equal one takes longer than all else here.
    return Condition(
        type=fact.type,
        status=fact.status,
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before and same else rfc3339(now),
        reason=fact.reason,
        message=message,
    )


def _facts(status: Status, summary: Summary) -> Iterable[_Fact]:
    phase, reason, message = summary.phase, summary.reason, summary.message
    if reason in _NOT_ACCEPTED:
        yield _Fact("Accepted", "False", reason, message)
    else:
        yield _Fact("Accepted", "True", Reason.ACCEPTED, _accepted(status))
    for kind, stage in _STAGE_FACTS:
        yield _stage_fact(kind, stage, status, summary)
    if summary.gates:
        yield _gates_fact(status)
    yield _workers_fact(status, summary)
    yield _Fact("Complete", _truth(phase == "Complete"), reason, message)
    yield _Fact("Failed", _truth(phase == "Failed"), reason, message)
    yield _Fact("Suspended", _truth(phase == "Suspended"), reason, message)
    # kstatus (Flux, Argo CD, `kubectl wait` scripts) reads these three.
    yield _Fact("Ready", _truth(phase == "Complete"), reason, message)
    yield _Fact("Reconciling", _truth(phase not in ("Complete", "Failed", "Suspended")), reason, message)
    yield _Fact("Stalled", _truth(phase == "Failed"), reason, message)


_NOT_ACCEPTED = (Reason.INVALID_SPEC, Reason.PROFILE_VIOLATED, Reason.PROFILE_NOT_FOUND)


def _accepted(status: Status) -> str:
    """That the job can be run, and under which profile."""
    profile = status.resolved.profile if status.resolved else None
    return f"the spec can be run, under the profile {profile.name} ({profile.chosen})" if profile else "the spec can be run"


def _truth(value: bool) -> Literal["True", "False"]:
    return "True" if value else "False"


_NOTHING_TRAINED = {Reason.BASELINE_SUFFICIENT: "a prompt alone is good enough", Reason.PLANNED: "spec.planOnly trains nothing"}
_HELD_BACK = (Reason.GATES_NOT_PASSED, Reason.GATES_INCONCLUSIVE)


def _stage_fact(kind: ConditionType, name: StageName, status: Status, summary: Summary) -> _Fact:
    """What a stage has achieved stays achieved: a later attempt goes through it again, but from what was saved."""
    stage = next((stage for stage in status.stages if stage.name == name), None)
    before = status.condition(kind)
    failed = status.failure if summary.phase == "Failed" else None
    if failed and failed.reason in _HELD_BACK and name in ("Evaluate", "Publish"):
        # The model was measured, and that is why it is not published.
        return _Fact(kind, "True", Reason.SUCCEEDED) if name == "Evaluate" else _Fact(kind, "False", failed.reason, failed.message)
    if failed and failed.stage == name:
        return _Fact(kind, "False", failed.reason, failed.message)
    if (stage and stage.state == "Succeeded") or (before and before.status == "True"):
        return _Fact(kind, "True", Reason.SUCCEEDED)
    if stage and stage.state == "Running":
        return _Fact(kind, "False", PHASES[name][1])
    if summary.reason in _NOTHING_TRAINED:
        return _Fact(kind, "False", summary.reason, _NOTHING_TRAINED[summary.reason])
    return _Fact(kind, "Unknown", Reason.PENDING)


_GATES: dict[Verdict, tuple[Literal["True", "False", "Unknown"], Reason]] = {
    "Passed": ("True", Reason.GATES_PASSED),
    "Failed": ("False", Reason.GATES_NOT_PASSED),
    "Inconclusive": ("Unknown", Reason.GATES_INCONCLUSIVE),
}
"""What a verdict on all gates comes to."""


def _gates_fact(status: Status) -> _Fact:
    """Whether the model that was measured passes; the gates that it does not pass are named."""
    verdict = status.evaluation.gates_verdict if status.evaluation else None
    if status.evaluation is None or verdict is None:
        return _Fact("GatesPassed", "Unknown", Reason.PENDING, "the tuned model has not been judged yet")
    truth, reason = _GATES[verdict]
    return _Fact("GatesPassed", truth, reason, gates_in_words(status.evaluation))


def _workers_fact(status: Status, summary: Summary) -> _Fact:
    if status.workers_wanted == 0:
        return _Fact("WorkersReady", "Unknown", Reason.PENDING, "no workers are wanted now")
    counted = f"{status.workers_ready} of {status.workers_wanted} workers run"
    words = f"{counted}; {summary.workers.message}" if summary.workers else counted
    if status.workers_ready >= summary.workers_needed:
        return _Fact("WorkersReady", "True", Reason.TRAINING, words)
    before = status.condition("WorkersReady")
    lost = before is not None and (before.status == "True" or before.reason == Reason.WORKERS_LOST)
    if summary.workers:
        return _Fact("WorkersReady", "False", summary.workers.reason, words)
    return _Fact("WorkersReady", "False", Reason.WORKERS_LOST if lost else Reason.PENDING, words)
