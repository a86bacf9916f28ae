"""What the trainer says, as part of the status. Pure."""

from collections.abc import Callable
from typing import TypeVar, get_args

from finetune_api.report import Report, brief_data, brief_evaluation
from finetune_api.status import COUNT_MAX, DataSummary, Evaluation, Progress, Resolved, Stage, StageName, Status, Usage
from finetune_api.v1alpha1 import Spec
from finetune_operator.gangs import next_gang

_ORDER: tuple[StageName, ...] = get_args(StageName)
Part = TypeVar("Part", DataSummary, Evaluation)


def with_report(status: Status, report: Report, spec: Spec) -> Status:
    """The status with what the current attempt says of itself. A termination message may be cut down: what it leaves out stays."""
    shown, wanted = status.progress or Progress(), _wanted(status, report, spec)
    lost_steps = max(status.attempt.lost_steps, min(status.attempt.earlier_lost_steps + report.lost_steps, COUNT_MAX))
    return status.model_copy(
        update={
            "stages": onward(status.stages, report.stages),
            "warnings": report.warnings or status.warnings,
            "workers_wanted": wanted,
            "resolved": _resolved(status.resolved, report.resolved),
            "model": report.model or status.model,
            "data": _fuller(status.data, report.data, brief_data),
            "progress": (report.progress or shown).model_copy(update={"last_update_time": shown.last_update_time}),
            "metrics": report.metrics or status.metrics,
            "checkpoints": report.checkpoints or status.checkpoints,
            "baseline": report.baseline or status.baseline,
            "search": report.search or status.search,
            "evaluation": _fuller(status.evaluation, report.evaluation, brief_evaluation),
            "artifacts": report.artifacts or status.artifacts,
            "plan": report.plan or status.plan,
            "usage": _usage(status, report.usage),
            "attempt": next_gang(status.attempt.model_copy(update={"lost_steps": lost_steps}), status.workers_wanted, wanted),
        }
    )


def without_details(status: Status) -> Status:
    """The status without what the head may make long, and nothing follows from: there is no room for it in the job."""
    short = {"warnings": (), "metrics": (), "baseline": (), "search": None, "data": None, "model": None, "plan": None}
    return status.model_copy(update={**short, "evaluation": status.evaluation and brief_evaluation(status.evaluation)})


def onward(known: tuple[Stage, ...], said: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """An attempt goes through its stages once: a head that goes to and fro between two of them is not believed."""
    reached, current = current_stage(known), current_stage(said)
    back = reached is not None and current is not None and _ORDER.index(current) < _ORDER.index(reached)
    return known if back or not said else said


def _fuller(known: Part | None, said: Part | None, brief: Callable[[Part], Part]) -> Part | None:
    """What is said, or what was known where that is the same with its details."""
    return known if said is None or (known is not None and brief(known) == said) else said


def _wanted(status: Status, report: Report, spec: Spec) -> int:
    """The head is a tenant's pod: it gets no more workers than the job's spec says, and none once the attempt has ended."""
    ended = report.outcome is not None or not status.attempt.running or spec.plan_only
    return 0 if ended else min(report.workers_wanted, spec.compute.workers.max)


def _resolved(known: Resolved | None, said: Resolved | None) -> Resolved | None:
    """What is said replaces what was known, but for the image and the profile: the operator chose those."""
    if said is None:
        return known
    ours = {"trainer_image": known.trainer_image if known else None, "profile": known.profile if known else None}
    return Resolved.model_validate({**(known.to_json() if known else {}), **said.to_json()}).model_copy(update=ours)


def _usage(status: Status, said: Usage | None) -> Usage | None:
    """A report counts its whole attempt each time: what earlier attempts used is added to it, not to the sum.

    GPU-seconds are not its say.
    """
    if said is None:
        return status.usage
    earlier = status.earlier_usage or Usage()
    # The head is a tenant's pod: a sum beyond what a status may hold must not make one that cannot be read again.
    tokens = min(earlier.trained_tokens + said.trained_tokens, COUNT_MAX)
    return (status.usage or Usage()).model_copy(update={"trained_tokens": tokens})


def current_stage(stages: tuple[Stage, ...]) -> StageName | None:
    """The stage that a job is in: the one that runs, else the last that it came to."""
    begun = [stage for stage in stages if stage.state != "Pending"]
    return next((stage.name for stage in begun if stage.state == "Running"), begun[-1].name if begun else None)
