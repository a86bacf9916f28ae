"""Whether a measured value keeps to a bound, for gates, for a sufficient baseline and for a model's health. Pure: plain numbers alone.

A value comes with its interval, of evaluation.confidence. The verdict is

    Passed        the whole interval is on the good side of the bound
    Failed        the whole interval is on the other side
    Inconclusive  the bound is inside, or nothing was measured: more examples in the suite would tell

What confidence means: with 0.95, a model whose true value is exactly at the bound passes with 2.5 of 100 suites of the same kind of
examples, since an interval has two ends and a gate looks at one; a worse model passes less often. All gates have to be passed, so a model
that truly misses one of them passes all no more often than that one, however many there are. Several checkpoints judged one after the other
on one suite are several chances: with k of them up to k times 2.5 of 100.

Where a value has no interval, as a validation loss that only its mean is known of, the value alone decides.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from finetune_api.baseline import Sufficient
from finetune_api.evaluation import LOWER_IS_BETTER, Gate
from finetune_api.status import GateResult, Verdict

_ROUNDING = 1e-9
"""Relative to the bound: 0.8 is at least 0.8 however it was computed."""


class Known(Protocol):
    """A value as far as it is known."""

    @property
    def value(self) -> float | None:
        """None where it was not measured."""

    @property
    def low(self) -> float | None:
        """Lower end of its interval, infinite where the interval tells nothing; None where there is no interval."""

    @property
    def high(self) -> float | None:
        """Upper end of its interval, likewise."""


@dataclass(frozen=True)
class Bounded:
    """A plain one."""

    value: float | None
    low: float | None = None
    high: float | None = None


NOT_MEASURED = Bounded(None)


def judge(gates: Iterable[Gate], values: Mapping[str, Known], changes: Mapping[str, Mapping[str, Known]]) -> tuple[GateResult, ...]:
    """The verdict on each gate, in their order.

    `values` are the tuned model's, by metric. `changes` are its values less those of what a gate's `over` names: by that name, and then by
    metric. What is absent was not measured.
    """
    return tuple(_judged(gate, values, changes) for gate in gates)


def is_sufficient(goal: Sufficient, known: Known) -> bool:
    """Whether the goal is reached for sure, so that nothing need be trained: as a gate is passed."""
    if goal.at_least is not None:
        return at_least(known, goal.at_least) == "Passed"
    return goal.at_most is not None and at_most(known, goal.at_most) == "Passed"


def lower_is_better(metric: str) -> bool:
    """Whether `suite/measure` improves by falling."""
    return metric.rpartition("/")[2] in LOWER_IS_BETTER


def at_least(known: Known, bound: float) -> Verdict:
    """Whether the value is not smaller than the bound."""
    if known.value is None or not math.isfinite(known.value):
        return "Inconclusive"
    low, high = (known.value, known.value) if known.low is None or known.high is None else (known.low, known.high)
    needed = bound - _ROUNDING * max(1.0, abs(bound))
    if low >= needed:
        return "Passed"
    return "Failed" if high < needed else "Inconclusive"


def at_most(known: Known, bound: float) -> Verdict:
    """Whether the value is not larger than the bound."""
    return at_least(turned(known), -bound)


def turned(known: Known) -> Bounded:
    """The value with its sign turned round: a fall as a gain."""
    return Bounded(*(None if end is None else -end for end in (known.value, known.high, known.low)))


def _judged(gate: Gate, values: Mapping[str, Known], changes: Mapping[str, Mapping[str, Known]]) -> GateResult:
    change = changes.get(gate.over or "", {}).get(gate.metric, NOT_MEASURED)
    value = values.get(gate.metric, NOT_MEASURED)
    if gate.at_least is not None:
        return _result(gate, value, at_least(value, gate.at_least), f"at least {gate.at_least:g}")
    if gate.at_most is not None:
        return _result(gate, value, at_most(value, gate.at_most), f"at most {gate.at_most:g}")
    if gate.min_improvement is not None:
        gain = turned(change) if lower_is_better(gate.metric) else change
        return _result(gate, gain, at_least(gain, gate.min_improvement), f"better by at least {gate.min_improvement:g}")
    most = gate.max_increase or 0.0
    return _result(gate, change, at_most(change, most), f"larger by at most {most:g}")


def _result(gate: Gate, known: Known, verdict: Verdict, required: str) -> GateResult:
    """What the status tells; numbers only, so that an infinite end is absent."""
    observed, low, high = (end if end is not None and math.isfinite(end) else None for end in (known.value, known.low, known.high))
    return GateResult(metric=gate.metric, verdict=verdict, observed=observed, low=low, high=high, required=required, over=gate.over)
