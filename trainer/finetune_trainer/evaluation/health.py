"""Known ills of a tuned model, each with a verdict: what it has forgotten, and whether it has learnt its examples by heart. Pure.

A verdict says what is clear at the confidence of the intervals (see gate.py), beyond what may be tolerated:

    Bad            worse by more than TOLERATED of the value before, for sure
    Good           not worse by more than that, for sure
    Inconclusive   neither
"""

from collections.abc import Sequence
from typing import Literal

from finetune_api.evaluation import Suite
from finetune_api.status import Health, Verdict
from finetune_trainer.evaluation.history import VALIDATION, Course, Point, gap_at, train_loss
from finetune_trainer.evaluation.intervals import apart
from finetune_trainer.evaluation.scores import Change, Measured
from finetune_trainer.gate import Bounded, Known, at_most, lower_is_better, turned

TOLERATED = 0.05
"""Share of the value before that a figure may become worse by."""
LEAST_TOLERATED = 0.01
"""Where that share is less: of nats, or of a share."""
WIDE = 0.25
"""Share of the validation loss from which on the training loss is far below it."""
ENOUGH = 3
"""Measurements of the validation loss after the first step that show a trend."""
GAP = "train/gap"

Finding = Literal["Good", "Bad", "Inconclusive"]
_WORST: tuple[Verdict, ...] = ("Passed", "Inconclusive", "Failed")
_FOUND: dict[Verdict, Finding] = {"Passed": "Good", "Failed": "Bad", "Inconclusive": "Inconclusive"}


def gap(train: Measured, validation: Measured) -> Measured:
    """train/gap: the validation loss less the training loss, of the same model; with an interval where both have one."""
    if train.value is None or validation.value is None:
        return Measured(GAP, None)
    value = validation.value - train.value
    if train.interval is None or validation.interval is None:
        return Measured(GAP, value)
    interval = apart(validation.value, validation.interval, train.value, train.interval)
    return Measured(GAP, value, interval.low, interval.high, n=min(train.n, validation.n))


def forgetting(suite: Suite, before: Sequence[Measured], changed: Sequence[Change]) -> Health | None:
    """Whether the tuned model is worse than the untuned one on a suite of that role: by its worst metric. None for another role.

    `before` is the untuned model's, `changed` the tuned model's less that.
    """
    if suite.role != "forgetting":
        return None
    values = {each.metric: each.value for each in before}
    found = [_forgotten(change, values.get(change.metric)) for change in changed if change.metric.startswith(f"{suite.name}/")]
    nothing: tuple[Verdict, str] = ("Inconclusive", f"nothing of {suite.name} was measured")
    verdict, message = max(found, key=lambda each: _WORST.index(each[0]), default=nothing)
    return Health(name="forgetting", suite=suite.name, verdict=_FOUND[verdict], message=message)


def overfitting(course: Course, known: Known, step: int | None = None) -> Health:
    """Whether the validation loss has risen again while the training loss fell on, or they have drifted far apart.

    `course` is the history of both, `known` the gap at the end (train/gap), `step` that of the model which is judged, where it is not the
    last. Bad is a rise from the lowest validation loss; a wide and growing gap without a rise is Inconclusive: the model knows its examples
    better than others, and yet is not worse for it.
    """
    points = [point for point in course.held_out if VALIDATION in point.values and (step is None or point.step <= step)]
    if not points:
        return _overfitting("Inconclusive", "the validation loss was not measured")
    lowest, last = min(points, key=lambda point: point.values[VALIDATION]), points[-1]
    least, now = lowest.values[VALIDATION], last.values[VALIDATION]
    risen = f"the validation loss has risen from {least:.4g} at step {lowest.step} to {now:.4g} at step {last.step}"
    if now - least > _tolerated(least):
        before, after = (train_loss(course, point.step) for point in (lowest, last))
        if before is not None and after is not None and after - before > (now - least) / 2:
            return _overfitting("Inconclusive", f"{risen}, and the training loss with it: the learning rate may be too high")
        return _overfitting("Bad", f"{risen}: more epochs make it worse")
    return _by_gap(course, points, known)


def _by_gap(course: Course, points: Sequence[Point], known: Known) -> Health:
    """The verdict where the validation loss has not risen."""
    now = points[-1].values[VALIDATION]
    close = at_most(known, WIDE * now)
    apart_by = "of unknown width" if known.value is None else f"of {known.value:.4g} to the training loss"
    if close == "Passed":
        return _overfitting("Good", f"the validation loss is {now:.4g}, with a gap {apart_by}")
    after_start = [point for point in points if point.step > 0]
    if len(after_start) < ENOUGH:
        return _overfitting(
            "Inconclusive", f"the validation loss was measured {len(after_start)} times, which shows no trend, with a gap {apart_by}"
        )
    half = after_start[len(after_start) // 2]
    then, later = (gap_at(course, point) for point in (half, points[-1]))
    if then is not None and later is not None and later - then > _tolerated(now):
        message = f"the validation loss has not risen, but the gap has grown from {then:.4g} at step {half.step} to {later:.4g}"
        return _overfitting("Inconclusive", f"{message}: the training loss falls on alone")
    return _overfitting("Good", f"the validation loss has not risen from its lowest, with a gap {apart_by} that does not grow")


def _forgotten(change: Change, before: float | None) -> tuple[Verdict, str]:
    """Passed where nothing is forgotten."""
    lower = lower_is_better(change.metric)
    if before is None or change.value is None:
        return "Inconclusive", f"{change.metric} was not measured before and after"
    if not lower and before <= 0:
        return "Passed", f"{change.metric} was {before:.4g} before: there was nothing to forget"
    worse = Bounded(change.value, change.low, change.high) if lower else turned(change)
    allowed = _tolerated(before)
    verdict = at_most(worse, allowed)
    words = f"{change.metric} {'rose' if change.value > 0 else 'fell'} by {abs(change.value):.4g} from {before:.4g}{_between(change)}"
    ends = {"Passed": "within", "Failed": "beyond", "Inconclusive": "not clear against"}
    return verdict, f"{words}: {ends[verdict]} the {allowed:.4g} that may be lost"


def _tolerated(before: float) -> float:
    return max(TOLERATED * abs(before), LEAST_TOLERATED)


def _between(change: Change) -> str:
    return "" if change.low is None or change.high is None else f" (interval of the change {change.low:.4g} to {change.high:.4g})"


def _overfitting(verdict: Finding, message: str) -> Health:
    return Health(name="overfitting", verdict=verdict, message=message)
