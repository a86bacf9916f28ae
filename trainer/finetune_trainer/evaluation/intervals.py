"""How far a measured value can be trusted: bootstrap intervals of a figure over the cases that it was measured on. Pure; no chance.

What confidence means: were the suite drawn anew, from the same kind of cases, again and again, then so large a share of the intervals would
hold the value that infinitely many such cases would give. It says nothing of cases of another kind.

A figure is computed from sums over cases, so a resample costs one row of a matrix product and no text is scored again: a mean needs the sum
of the scores and their number, BLEU its ten counts.

The interval is BCa (Efron 1987), which corrects for bias and skewness, with the quantiles of Student's t in place of the normal ones, since
a resample of few cases varies too little (Hesterberg 2015, section 5.3). A resample never goes beyond the cases that there are: with fewer
than FEW of them the interval also holds that of the jackknife (Tukey 1958), which does.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Figure = Callable[[Array], Array]
"""From sums over cases [..., K] to the figure [...]; NaN or infinite where there is none."""

RESAMPLES = 4000
"""The ends of an interval at 95 % then differ from those of infinitely many by about one percent of its width."""
SEED = 20231
FEW = 10
_AT_ONCE = 1 << 22
"""Draws in memory at once."""
_SAME = 1e-12
"""Relative to the estimate: a smaller difference is rounding."""
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """Where the true value lies, with some confidence; infinite ends where nothing is known."""

    low: float
    high: float


UNKNOWN = Interval(-math.inf, math.inf)


@dataclass(frozen=True)
class Estimate:
    """What a figure is computed from, case by case."""

    sums: Array
    """[N, K]: what each case adds."""
    figure: Figure
    limits: tuple[float, float] | None = None
    """Smallest and largest possible value: 0 and 1 of a share, 0 and 100 of BLEU; None where there are none."""

    @property
    def value(self) -> float | None:
        """The figure over all cases; None where it is no number."""
        found = float(self.figure(self.sums.sum(axis=0))) if len(self.sums) else math.nan
        return found if math.isfinite(found) else None

    @property
    def cases(self) -> int:
        """Cases that add anything."""
        return int(np.count_nonzero(self.sums.any(axis=1)))


def mean_of(scores: Sequence[float | None], limits: tuple[float, float] | None = None) -> Estimate:
    """The mean of those scores that there are: N cases, K = 2."""
    return Estimate(np.array([(0.0, 0.0) if score is None else (score, 1.0) for score in scores], np.float64).reshape(-1, 2), ratio, limits)


def ratio(sums: Array) -> Array:
    """The first sum over the second: [..., 2] to [...]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = sums[..., 0] / sums[..., 1]
    return found


def difference_of(after: Estimate, before: Estimate) -> Estimate:
    """What the one has more than the other over the same cases, in the same order: a resample takes both figures of a case, or neither.

    Cases that add to one of them only count for none. Raises ValueError where the numbers of cases differ.
    """
    if len(after.sums) != len(before.sums):
        raise ValueError(f"{len(after.sums)} cases cannot be paired with {len(before.sums)}")
    split = after.sums.shape[1]
    both = np.logical_and(after.sums.any(axis=1), before.sums.any(axis=1))
    limits = None
    if after.limits is not None and before.limits is not None:
        limits = after.limits[0] - before.limits[1], after.limits[1] - before.limits[0]
    return Estimate(
        np.concatenate([after.sums, before.sums], axis=1) * both.reshape(-1, 1),
        lambda sums: after.figure(sums[..., :split]) - before.figure(sums[..., split:]),
        limits,
    )


def intervals_of(estimates: Sequence[Estimate], confidence: float, *, resamples: int = RESAMPLES, seed: int = SEED) -> tuple[Interval, ...]:
    """The interval of each. Those of as many cases are drawn together, so one resample is the same cases in all of them."""
    drawn: dict[int, Array] = {}
    for count in {len(estimate.sums) for estimate in estimates}:
        together = [estimate.sums for estimate in estimates if len(estimate.sums) == count]
        drawn[count] = resampled(np.concatenate(together, axis=1), resamples, seed)
    found, start = [], dict.fromkeys(drawn, 0)
    for estimate in estimates:
        count, width = estimate.sums.shape
        sums = drawn[count][:, start[count] : start[count] + width]
        start[count] += width
        found.append(_bca(estimate, estimate.figure(sums), confidence))
    return tuple(found)


def interval_of(estimate: Estimate, confidence: float, *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """The interval of one."""
    return intervals_of([estimate], confidence, resamples=resamples, seed=seed)[0]


def apart(after: float, its: Interval, before: float, other: Interval) -> Interval:
    """The interval of `after - before` from the two intervals, where the cases are not the same and cannot be paired.

    The method of variance estimates recovery (Zou and Donner 2008): each side is as far away as the roots of the squared distances.
    """
    difference = after - before
    return Interval(
        difference - math.hypot(after - its.low, other.high - before), difference + math.hypot(its.high - after, before - other.low)
    )


def resampled(sums: Array, resamples: int = RESAMPLES, seed: int = SEED) -> Array:
    """[N, K] to [resamples, K]: the sums over N cases drawn with replacement, again and again."""
    if not len(sums):
        return np.full((resamples, sums.shape[1]), np.nan)
    return np.concatenate([weights @ sums for weights in _weights(len(sums), resamples, seed)])


def _weights(count: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each resample takes each case: [resamples, N], in parts of bounded size."""
    generator = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // count)
    for start in range(0, resamples, rows):
        many = min(rows, resamples - start)
        cases = generator.integers(count, size=(many, count)) + count * np.arange(many)[:, None]
        yield np.bincount(cases.ravel(), minlength=many * count).reshape(many, count).astype(np.float64)


def _bca(estimate: Estimate, drawn: Array, confidence: float) -> Interval:
    """The interval from the figure of each resample, [resamples]; it always holds the estimate."""
    value, count = estimate.value, estimate.cases
    drawn = drawn[np.isfinite(drawn)]
    if value is None or not len(drawn):
        return UNKNOWN
    if np.ptp(drawn) <= _SAME * max(1.0, abs(value)):
        return _never_varied(value, count, estimate.limits, confidence)
    below = (np.count_nonzero(drawn < value) + np.count_nonzero(drawn <= value)) / (2 * len(drawn))
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / len(drawn)), 1 - 0.5 / len(drawn)))
    away, reach = _jackknife(estimate), _reach(count, confidence)
    squares = float((away**2).sum())
    skewness = float((away**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    low, high = np.quantile(drawn, [_corrected(bias, -reach, skewness), _corrected(bias, reach, skewness)])
    beyond = reach * math.sqrt(squares) * (count - 1) / count if count < FEW else 0.0
    least, most = estimate.limits or (-math.inf, math.inf)
    return Interval(max(least, min(float(low), value - beyond)), min(most, max(float(high), value + beyond)))


def _never_varied(value: float, count: int, limits: tuple[float, float] | None, confidence: float) -> Interval:
    """The interval where every case says the same: resamples say nothing of what was never seen.

    At least the share `alike` of all cases is like those seen, else so many alike would come less often than the confidence allows (the
    exact binomial bound); the rest may be anything within the limits. Where there are none, one case says nothing of others.
    """
    if limits is None:
        return UNKNOWN if count < 2 else Interval(value, value)
    alike = ((1 - confidence) / 2) ** (1 / count)
    return Interval(value * alike + limits[0] * (1 - alike), value * alike + limits[1] * (1 - alike))


def _jackknife(estimate: Estimate) -> Array:
    """By how much the figure falls when each case is left out in turn, from their mean: [N]."""
    without = estimate.figure(estimate.sums.sum(axis=0) - estimate.sums[estimate.sums.any(axis=1)])
    without = without[np.isfinite(without)]
    away: Array = without.mean() - without if len(without) else without
    return away


def _reach(count: int, confidence: float) -> float:
    """How many standard errors the interval reaches: Student's t, for the deviation that a resample of N has too small."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.5 + confidence / 2)) * math.sqrt(count / (count - 1))


def _corrected(bias: float, reach: float, skewness: float) -> float:
    """The share of the resamples below an end of the interval."""
    scale = 1 - skewness * (bias + reach)
    return _NORMAL.cdf(bias + (bias + reach) / scale) if scale > 0 else float(reach > 0)
