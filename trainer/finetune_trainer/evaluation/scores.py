"""What a candidate reaches on a suite, and how it differs from another one on the same cases: each figure with its interval. Pure."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from finetune_api.evaluation import Suite, SuiteMetric
from finetune_api.status import Difference, EvaluationResult
from finetune_trainer.evaluation import metrics
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.evaluation.intervals import (
    UNKNOWN,
    Array,
    Estimate,
    Figure,
    Interval,
    apart,
    difference_of,
    intervals_of,
    mean_of,
    ratio,
)

SHARE = (0.0, 1.0)
_PERCENT = (0.0, 100.0)
_COSINE = (-1.0, 1.0)
PerCase = tuple[float | None, ...]

_REFERENCED: Mapping[SuiteMetric, Callable[[str, str], float | None]] = {
    "exactMatch": metrics.exact_match,
    "f1": metrics.token_f1,
    "rouge1": lambda answer, reference: metrics.rouge_n(answer, reference, 1),
    "rouge2": lambda answer, reference: metrics.rouge_n(answer, reference, 2),
    "rougeL": metrics.rouge_l,
}
"""Scores of an answer beside its reference, whose mean is the metric."""
_GIVEN: Mapping[SuiteMetric, tuple[float, float]] = {"embeddingSimilarity": _COSINE, "judgeScore": SHARE, "judgeWinRate": SHARE}
"""Scores that another model gives, with their limits."""


@dataclass(frozen=True)
class Measured:
    """One figure of one candidate."""

    metric: str
    """suite/measure."""
    value: float | None
    """None where no case has one."""
    low: float | None = None
    """Lower end of the interval; None where none can be known, as of a loss that only its mean is told of; infinite for too few cases."""
    high: float | None = None
    per_case: PerCase = ()
    """Of each case by itself, in the suite's order; None of a case that it is not defined for."""
    n: int = 0
    """Cases that it was measured on."""
    ids: tuple[str, ...] = ()
    """The cases' own."""
    estimate: Estimate | None = field(default=None, repr=False, compare=False)
    """What it was computed from, so that it can be compared case by case."""

    @property
    def interval(self) -> Interval | None:
        """Both ends, where there are any."""
        return None if self.low is None or self.high is None else Interval(self.low, self.high)


@dataclass(frozen=True)
class Change:
    """What one candidate has more than another in one figure; below zero is less, whether that is good or not."""

    metric: str
    value: float | None
    low: float | None = None
    """As in Measured."""
    high: float | None = None
    paired: bool = False
    """Whether it was measured case by case."""


def measured(
    suite: Suite,
    cases: Sequence[Case],
    answered: Iterable[Answered],
    confidence: float,
    given: Mapping[SuiteMetric, Sequence[float | None]] | None = None,
) -> tuple[Measured, ...]:
    """The suite's metrics of one candidate, in the suite's order, each with its interval.

    `given` holds the scores of each case, in the order of `cases`, that other models gave: embeddingSimilarity, judgeScore (0 to 1),
    judgeWinRate (0, 0.5 or 1). Metrics that compare with a reference leave cases without one out. BLEU and chrF are in 0..100, shares in
    0..1, a loss is the mean over all tokens of all cases, in nats. Raises ValueError where a case has no answer, a given score is missing,
    or the suite's pattern is none.
    """
    found = {each.id: each for each in answered}
    if missing := [case.id for case in cases if case.id not in found]:
        raise ValueError(f"suite {suite.name}: {len(missing)} of {len(cases)} cases have no answer, the first is {missing[0]}")
    answers = [found[case.id] for case in cases]
    estimates = [_estimate(metric, suite, cases, answers, given or {}) for metric in suite.metrics]
    ids = tuple(case.id for case in cases)
    return tuple(
        Measured(
            f"{suite.name}/{metric}",
            estimate.value,
            interval.low,
            interval.high,
            _per_case(metric, estimate),
            estimate.cases,
            ids,
            estimate,
        )
        for metric, estimate, interval in zip(suite.metrics, estimates, intervals_of(estimates, confidence), strict=True)
    )


def changes(after: Sequence[Measured], before: Sequence[Measured], confidence: float) -> tuple[Change, ...]:
    """How the one differs from the other in each metric that both have, in the order of the first.

    The difference is over the cases that both know, which are the same where their ids are, and it is paired: resamples take a case's
    results in both. Where they share none, an interval follows from the two, and is wider.
    """
    others = {each.metric: each for each in before}
    pairs = [(each, others[each.metric]) for each in after if each.metric in others]
    paired = [_paired(*pair) for pair in pairs]
    intervals = iter(intervals_of([each for each in paired if each is not None], confidence))
    return tuple(
        _unpaired(one, other) if estimate is None else _change(one.metric, estimate, next(intervals))
        for (one, other), estimate in zip(pairs, paired, strict=True)
    )


def published(result: EvaluationResult) -> Measured:
    """What another job's status tells of its tuned model; it knows no cases."""
    return Measured(result.metric, result.value, result.low, result.high, n=result.n or 0)


def results(after: Sequence[Measured], before: Sequence[Measured], differences: Sequence[Change]) -> tuple[EvaluationResult, ...]:
    """The figures of the tuned model beside those of the untuned one, as the status tells them."""
    others = {each.metric: each.value for each in before}
    known = {each.metric: told(each) for each in differences}
    return tuple(
        EvaluationResult(
            metric=each.metric,
            value=each.value,
            baseline=others.get(each.metric),
            low=finite(each.low),
            high=finite(each.high),
            difference=known.get(each.metric),
            n=each.n or None,
        )
        for each in after
    )


def told(change: Change) -> Difference | None:
    """A change as the status tells it; None where there is none."""
    return None if change.value is None else Difference(value=change.value, low=finite(change.low), high=finite(change.high))


def finite(end: float | None) -> float | None:
    """An end of an interval, or None where that is no number."""
    return end if end is not None and math.isfinite(end) else None


def _paired(after: Measured, before: Measured) -> Estimate | None:
    """The difference over the cases that both know; None where there is none."""
    if after.estimate is None or before.estimate is None:
        return None
    places = {name: place for place, name in enumerate(before.ids)}
    common = [(place, places[name]) for place, name in enumerate(after.ids) if name in places]
    if not common:
        return None
    mine, theirs = (list(side) for side in zip(*common, strict=True))
    one, other = after.estimate, before.estimate
    return difference_of(replace(one, sums=one.sums[mine]), replace(other, sums=other.sums[theirs]))


def _change(metric: str, estimate: Estimate, interval: Interval) -> Change:
    return Change(metric, estimate.value, interval.low, interval.high, paired=True)


def _unpaired(after: Measured, before: Measured) -> Change:
    if after.value is None or before.value is None:
        return Change(after.metric, None, UNKNOWN.low, UNKNOWN.high)
    if after.interval is None or before.interval is None:
        return Change(after.metric, after.value - before.value)
    interval = apart(after.value, after.interval, before.value, before.interval)
    return Change(after.metric, after.value - before.value, interval.low, interval.high)


def _estimate(
    metric: SuiteMetric,
    suite: Suite,
    cases: Sequence[Case],
    answers: Sequence[Answered],
    given: Mapping[SuiteMetric, Sequence[float | None]],
) -> Estimate:
    """What a metric is computed from."""
    if metric in _TOKENS:
        name, figure, limits = _TOKENS[metric]
        return Estimate(_rows([(getattr(each, name), each.labels) for each in answers], 2), figure, limits)
    if metric in _GIVEN:
        if len(given.get(metric, ())) != len(cases):
            raise ValueError(f"suite {suite.name}: {len(given.get(metric, ()))} scores of {metric} for {len(cases)} cases")
        return mean_of(given[metric], _GIVEN[metric])
    if metric in ("jsonValidity", "regex"):
        score = metrics.valid_json if metric == "jsonValidity" else metrics.matcher(suite.pattern or "")
        return mean_of([score(each.text) for each in answers], SHARE)
    pairs = [(each.text, case.reference) if case.reference else None for each, case in zip(answers, cases, strict=True)]
    if metric in _COUNTED:
        count, width, figure = _COUNTED[metric]
        return Estimate(_rows([count(*pair) if pair else () for pair in pairs], width), figure, _PERCENT)
    return mean_of([_REFERENCED[metric](*pair) if pair else None for pair in pairs], SHARE)


def _perplexity(sums: Array) -> Array:
    with np.errstate(over="ignore"):
        found: Array = np.exp(ratio(sums))
    return found


_TOKENS: Mapping[SuiteMetric, tuple[str, Figure, tuple[float, float] | None]] = {
    "loss": ("loss", ratio, None),
    "perplexity": ("loss", _perplexity, None),
    "tokenAccuracy": ("correct", ratio, SHARE),
}
"""Figures of the reference's own tokens: what of an answer is summed, over its labels."""
_COUNTED: Mapping[SuiteMetric, tuple[Callable[[str, str], Sequence[float]], int, Figure]] = {
    "bleu": (metrics.bleu_counts, metrics.BLEU_COUNTS, metrics.bleu),
    "chrf": (metrics.chrf_counts, metrics.CHRF_COUNTS, metrics.chrf),
}
"""Figures of a whole corpus: what of a case is counted, how many counts these are, and the figure of their sums."""


def _rows(rows: Sequence[Sequence[float]], width: int) -> Array:
    """[N, width]; an empty row adds nothing."""
    return np.array([row or (0.0,) * width for row in rows], np.float64).reshape(-1, width)


def _per_case(metric: SuiteMetric, estimate: Estimate) -> PerCase:
    """The figure of each case by itself; BLEU as sacrebleu has it for single sentences."""
    values = metrics.bleu(estimate.sums, effective_order=True) if metric == "bleu" else estimate.figure(estimate.sums)
    there = estimate.sums.any(axis=1) & np.isfinite(values)
    return tuple(float(value) if holds else None for value, holds in zip(values, there, strict=True))
