"""The part of a report that tells of the search. Pure."""

from collections.abc import Iterator, Sequence

from finetune_api.search import SearchGoal
from finetune_api.status import SearchSummary
from finetune_trainer.evaluation.escaping import code, inline
from finetune_trainer.evaluation.figures import number
from finetune_trainer.evaluation.tables import table
from finetune_trainer.trials import Trial

TRIALS_MAX = 50
"""Trials in the table."""


def search_section(goal: SearchGoal, search: SearchSummary, trials: Sequence[Trial], picture: str | None) -> Iterator[str]:
    """Its lines; `picture` is the file of the trials' picture, where there is one."""
    yield "## Search"
    yield ""
    counts = {"completed": search.completed, "stopped early": search.pruned, "failed": search.failed}
    yield f"{search.trials} trials: {', '.join(f'{count} {what}' for what, count in counts.items() if count) or 'none ended'}."
    if best := search.best:
        yield f"The best is trial {best.trial} with {code(goal.metric)} {number(best.value)}; its values were trained to the end:"
        yield ""
        yield from table(("field", "value"), ((code(path), inline(_scalar(value))) for path, value in best.parameters.items()), "lr")
    if picture:
        yield ""
        yield f"![What the trials came to, by each field that was searched; the table below has the same figures]({picture})"
    if trials:
        yield ""
        yield from _trials(trials, goal)


def _trials(trials: Sequence[Trial], goal: SearchGoal) -> Iterator[str]:
    """The best first, those without a value last."""
    sign = 1.0 if goal.mode == "min" else -1.0
    ranked = sorted(trials, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0), trial.number))
    yield from table(
        ("trial", code(goal.metric), "state", "values"),
        (
            (
                f"{trial.number}",
                number(trial.value),
                f"{trial.state}: {inline(trial.reason)}" if trial.reason else trial.state,
                ", ".join(f"{code(path)} {inline(_scalar(value))}" for path, value in sorted(trial.values.items())),
            )
            for trial in ranked[:TRIALS_MAX]
        ),
        "rrll",
    )
    if len(ranked) > TRIALS_MAX:
        yield ""
        yield f"{len(ranked) - TRIALS_MAX} more trials are left out."


def _scalar(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
