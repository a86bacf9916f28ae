"""Bootstrap intervals against closed forms, against scipy's bootstrap, and by how often they hold the truth."""

import math

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from scipy import stats

from finetune_trainer.evaluation.intervals import (
    SEED,
    UNKNOWN,
    Estimate,
    Interval,
    apart,
    difference_of,
    interval_of,
    intervals_of,
    mean_of,
    ratio,
    resampled,
)
from finetune_trainer.evaluation.metrics import bleu, bleu_counts

NORMAL = np.random.default_rng(11).normal(3.0, 2.0, 400)


def test_resampled_means_spread_as_the_closed_form_says() -> None:
    """The variance of a resample's mean is the sample's own variance over N."""
    means = resampled(mean_of(NORMAL.tolist()).sums, 40_000)
    spread = (means[:, 0] / means[:, 1]).std()
    assert spread == pytest.approx(NORMAL.std() / math.sqrt(len(NORMAL)), rel=0.015)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("count", [30, 400])
def test_the_interval_of_a_mean_is_that_of_students_t(confidence: float, count: int) -> None:
    """Normal theory: mean -+ t s / sqrt(N); thirty drawn numbers are themselves somewhat skewed."""
    sample = NORMAL[:count]
    found = interval_of(mean_of(sample.tolist()), confidence, resamples=40_000)
    low, high = stats.t.interval(confidence, count - 1, sample.mean(), stats.sem(sample))
    assert found.high - found.low == pytest.approx(high - low, rel=0.04)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.08 * (high - low)), pytest.approx(high, abs=0.08 * (high - low)))


@pytest.mark.parametrize("count", [2, 5, 9])
def test_few_cases_have_at_least_students_interval(count: int) -> None:
    """Reaching beyond the cases themselves, by the square root of N / (N - 1) at most."""
    sample = NORMAL[:count]
    found = interval_of(mean_of(sample.tolist()), 0.95)
    low, high = stats.t.interval(0.95, count - 1, sample.mean(), stats.sem(sample))
    assert found.low <= low + 1e-9
    assert found.high >= high - 1e-9
    assert found.high - found.low == pytest.approx(high - low, rel=math.sqrt(count / (count - 1)) - 1 + 0.05)


def test_the_interval_of_a_share_is_that_of_normal_theory() -> None:
    scores = [1.0] * 240 + [0.0] * 160
    found = interval_of(mean_of(scores, (0.0, 1.0)), 0.95)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 400)
    assert (found.low, found.high) == (pytest.approx(0.6 - half, abs=0.004), pytest.approx(0.6 + half, abs=0.004))


@pytest.mark.parametrize("draw", ["exponential", "normal", "pareto"])
def test_many_cases_give_scipys_interval(draw: str) -> None:
    """Efron's BCa of the same resamples. For 500 cases Student's t differs from the normal quantile by a third of a percent."""
    drawn = np.random.default_rng(5)
    sample = drawn.pareto(2.5, size=500) if draw == "pareto" else getattr(drawn, draw)(size=500)
    reference = stats.bootstrap((sample,), np.mean, n_resamples=8000, method="BCa", rng=np.random.default_rng(1)).confidence_interval
    found = interval_of(mean_of(sample.tolist()), 0.95, resamples=8000, seed=1)
    assert found.low == pytest.approx(reference.low, abs=0.02 * stats.sem(sample))
    assert found.high == pytest.approx(reference.high, abs=0.02 * stats.sem(sample))


def test_a_ratio_of_sums_gives_scipys_interval() -> None:
    """A loss per token: cases weigh as many tokens as they have."""
    drawn = np.random.default_rng(8)
    tokens = drawn.integers(1, 40, 300).astype(float)
    losses = tokens * drawn.gamma(4.0, 0.5, 300)
    reference = stats.bootstrap(
        (losses, tokens),
        lambda loss, count, axis: loss.sum(axis=axis) / count.sum(axis=axis),
        n_resamples=8000,
        paired=True,
        vectorized=True,
        method="BCa",
        rng=np.random.default_rng(2),
    ).confidence_interval
    found = interval_of(Estimate(np.stack([losses, tokens], axis=1), ratio), 0.95, resamples=8000, seed=2)
    assert found.low == pytest.approx(reference.low, abs=0.02 * (reference.high - reference.low))
    assert found.high == pytest.approx(reference.high, abs=0.02 * (reference.high - reference.low))


@pytest.mark.parametrize("count", [5, 20, 80])
@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(count: int, draw: str) -> None:
    """600 suites of one kind, drawn anew. The plain percentile interval holds the mean of five exponential cases 79 times in 100."""
    drawn = np.random.default_rng(count)
    truth = 0.0 if draw == "normal" else 1.0
    held = 0
    for _ in range(600):
        found = interval_of(mean_of(getattr(drawn, draw)(size=count).tolist()), 0.95, resamples=800)
        held += found.low <= truth <= found.high
    least = {("exponential", 5): 0.85, ("exponential", 20): 0.91}.get((draw, count), 0.925)
    assert least <= held / 600 <= 0.99


def test_pairs_tell_apart_what_two_intervals_cannot() -> None:
    """Each case is harder or easier for both: the difference is known far better than either."""
    drawn = np.random.default_rng(4)
    before = drawn.normal(2.0, 1.0, 100)
    after = before - 0.05 + drawn.normal(0.0, 0.1, 100)
    estimates = mean_of(after.tolist()), mean_of(before.tolist())
    mine, other, paired = intervals_of([*estimates, difference_of(*estimates)], 0.95)
    assert mine.high > other.low  # the two overlap
    assert paired.high < 0
    low, high = stats.t.interval(0.95, 99, (after - before).mean(), stats.sem(after - before))
    assert (paired.low, paired.high) == (pytest.approx(low, abs=0.003), pytest.approx(high, abs=0.003))


def test_a_paired_difference_of_bleu_is_that_of_the_corpora() -> None:
    """Resampled by their counts as if the texts were scored again."""
    references = [f"the {word} sat on the {other} mat" for word in ("cat", "dog", "owl", "fox") for other in ("red", "blue", "old")]
    good = [text.replace("sat on", "sat upon") if place % 3 == 0 else text for place, text in enumerate(references)]
    poor = [text.replace("sat on the", "is at a") if place % 2 else text for place, text in enumerate(references)]
    counts = [np.array([bleu_counts(*pair) for pair in zip(texts, references, strict=True)], float) for texts in (good, poor)]
    after, before = (Estimate(each, bleu) for each in counts)
    difference = difference_of(after, before)
    cases = np.random.default_rng(SEED).integers(12, size=(50, 12))
    for sums, chosen in zip(resampled(difference.sums, 50), cases, strict=True):
        scores = [
            BLEU().corpus_score([texts[case] for case in chosen], [[references[case] for case in chosen]]).score for texts in (good, poor)
        ]
        assert difference.figure(sums) == pytest.approx(scores[0] - scores[1])
    assert after.value is not None
    assert before.value is not None
    assert difference.value == pytest.approx(after.value - before.value)


def test_cases_that_only_one_side_has_a_score_for_are_left_out() -> None:
    difference = difference_of(mean_of([1.0, None, 0.5, 0.5]), mean_of([0.0, 1.0, None, 0.25]))
    assert difference.value == pytest.approx((1.5 - 0.25) / 2)
    assert difference.cases == 2


def test_different_numbers_of_cases_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="3 cases cannot be paired with 2"):
        difference_of(mean_of([1.0, 2.0, 3.0]), mean_of([1.0, 2.0]))


@pytest.mark.parametrize(("right", "count"), [(1.0, 1), (1.0, 3), (1.0, 20), (0.0, 20)])
def test_all_right_is_no_certainty(right: float, count: int) -> None:
    """The exact binomial interval (Clopper and Pearson) of all or none of N, worked out by scipy."""
    found = interval_of(mean_of([right] * count, (0.0, 1.0)), 0.95)
    exact = stats.binomtest(int(right * count), count).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_a_difference_that_never_varied_may_be_either_way() -> None:
    """Twenty cases right before and after: (1 - 0.025^(1/20)) = 16.8 % of all may have become wrong, or right."""
    right = mean_of([1.0] * 20, (0.0, 1.0))
    found = interval_of(difference_of(right, right), 0.95)
    assert (found.low, found.high) == (pytest.approx(-0.1684, abs=1e-4), pytest.approx(0.1684, abs=1e-4))


def test_losses_that_never_varied() -> None:
    assert interval_of(mean_of([2.5, 2.5, 2.5]), 0.95) == Interval(2.5, 2.5)
    assert interval_of(mean_of([2.5]), 0.95) == UNKNOWN
    assert interval_of(mean_of([2.5, None]), 0.95) == UNKNOWN  # one case, though drawn twice


@pytest.mark.parametrize("scores", [[], [None, None]])
def test_nothing_measured_is_nothing_known(scores: list[float | None]) -> None:
    assert mean_of(scores).value is None
    assert interval_of(mean_of(scores), 0.95) == UNKNOWN


def test_two_cases_reach_no_further_than_they_do() -> None:
    assert interval_of(mean_of([0.0, 1.0], (0.0, 1.0)), 0.95) == Interval(0.0, 1.0)


def test_an_interval_holds_its_value_and_no_chance() -> None:
    scores = [0.0] * 97 + [1.0, 1.0, 50.0]
    found = interval_of(mean_of(scores), 0.95)
    assert found.low <= 0.52 <= found.high
    assert found == interval_of(mean_of(scores), 0.95)


def test_one_case_apart_at_a_high_confidence() -> None:
    """The correction for skewness has a pole there; beyond it lie all resamples."""
    found = interval_of(mean_of([0.0] * 9 + [1.0], (0.0, 1.0)), 0.99999)
    assert found.low == 0.0
    assert found.high >= 0.5


def test_many_cases_are_drawn_in_parts() -> None:
    """300,000 cases: the draws do not fit into memory at once. The mean of 0..N-1, by normal theory."""
    count = 300_000
    found = interval_of(mean_of(np.arange(count, dtype=float).tolist()), 0.95, resamples=120)
    error = count / math.sqrt(12) / math.sqrt(count)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.25)


def test_two_groups_of_cases_are_set_beside_each_other_as_welch_does() -> None:
    """Symmetric intervals: the root of the summed squares of their halves, as in Welch's test."""
    drawn = np.random.default_rng(6)
    one, other = drawn.normal(1.0, 1.0, 300), drawn.normal(0.4, 2.0, 200)
    both = [(float(side.mean()), interval_of(mean_of(side.tolist()), 0.95)) for side in (one, other)]
    found = apart(*both[0], *both[1])
    welch = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(welch.low, abs=0.03), pytest.approx(welch.high, abs=0.03))
    assert apart(1.0, UNKNOWN, 0.0, Interval(0.0, 0.0)) == UNKNOWN
