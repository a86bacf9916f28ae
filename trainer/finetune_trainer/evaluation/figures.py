"""Figures in words and signs, as tables and pictures of a report show them. Pure."""

from typing import Literal

from finetune_api.evaluation import GENERATED_METRICS, LOWER_IS_BETTER
from finetune_api.status import Difference, EvaluationResult

ABSENT, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
Kind = Literal["better", "worse", "not clear", "no interval"]
_PERCENT_METRICS = ("bleu", "chrf")
_PLACES = ((1000, 0), (100, 1), (10, 2), (0.0995, 3), (0.00095, 4))
"""From which size on a number is written with how many decimal places."""


def number(value: float | None) -> str:
    """Three or four significant digits, without an exponent where a person would write none."""
    if value is None:
        return ABSENT
    size = abs(value)
    if size and not 1e-4 <= size < 1e7:
        return f"{value:.2e}".replace("-", MINUS)
    places = next((places for bound, places in _PLACES if size >= bound), 5) if size else 0
    return f"{value:,.{places}f}".replace("-", MINUS)


def signed(value: float | None) -> str:
    """A change: with its sign."""
    if value is None:
        return ABSENT
    return f"{'+' if value > 0 else MINUS if value < 0 else '±'}{number(abs(value))}"


def interval(low: float | None, high: float | None) -> str:
    """Both ends."""
    return ABSENT if low is None or high is None else f"{number(low)} to {number(high)}"


def signed_interval(change: Difference | None) -> str:
    """Both ends of a change's interval."""
    if change is None or change.low is None or change.high is None:
        return ABSENT
    return f"{signed(change.low)} to {signed(change.high)}"


def largest(metric: str) -> float | None:
    """What a metric cannot exceed; None where there is no bound."""
    name = metric.rpartition("/")[2]
    if name in _PERCENT_METRICS:
        return 100.0
    return 1.0 if name in GENERATED_METRICS or name == "tokenAccuracy" else None


def change_of(result: EvaluationResult) -> Difference | None:
    """What the tuning has changed, with an interval where there is one."""
    if result.difference is not None or result.value is None or result.baseline is None:
        return result.difference
    return Difference(value=result.value - result.baseline)


def kind_of(metric: str, change: Difference | None) -> Kind | None:
    """What a change is, in a word; None where it is not known."""
    if change is None:
        return None
    if change.low is None or change.high is None:
        return "no interval"
    if change.low <= 0 <= change.high:
        return "not clear"
    return "better" if (change.value < 0) == (metric.rpartition("/")[2] in LOWER_IS_BETTER) else "worse"
