"""How often gates decide wrongly: over many suites drawn from models whose true figures are known. Pure, and the same each time."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from finetune_api.evaluation import Gate
from finetune_trainer.evaluation.intervals import difference_of, interval_of, mean_of
from finetune_trainer.gate import Bounded, judge

Array = npt.NDArray[np.float64]
SUITES, CASES = 600, 60
RIGHT_BEFORE, RIGHT_AFTER = 0.5, 0.7


def within(count: int, share: float) -> bool:
    """Whether so many of SUITES are what a true share gives in 998 of 1,000 times, by the binomial distribution."""
    low, high = stats.binom.ppf([0.001, 0.999], SUITES, share)
    return bool(low <= count <= high)


def verdicts(bound: dict[str, object], metric: str, draw: Callable[[], tuple[Array, Array]], *, share: bool) -> Counter[str]:
    """What a gate of 95 % says of SUITES suites; `draw` gives the scores before and after of a suite's cases, [CASES] each."""
    gate = Gate.model_validate({"metric": metric, "over": "baseline", **bound})
    limits, found = (0.0, 1.0) if share else None, Counter[str]()
    for _ in range(SUITES):
        before, after = draw()
        change = difference_of(mean_of(after.tolist(), limits), mean_of(before.tolist(), limits))
        interval = interval_of(change, 0.95, resamples=1000)
        known = {"baseline": {metric: Bounded(change.value, interval.low, interval.high)}}
        found[judge([gate], {}, known)[0].verdict] += 1
    return found


def losses(generator: np.random.Generator, change: float) -> tuple[Array, Array]:
    """Losses of the same cases before and after: hard cases are hard for both, and what changes has a spread of 0.5 nats."""
    before = generator.lognormal(0.3, 0.6, CASES)
    return before, before + change + 0.5 * generator.standard_normal(CASES)


def matches(generator: np.random.Generator) -> tuple[Array, Array]:
    """Right or wrong before and after, the latter by chance of its own."""
    before, after = generator.random(CASES) < RIGHT_BEFORE, generator.random(CASES) < RIGHT_AFTER
    return before.astype(float), after.astype(float)


@pytest.mark.parametrize(
    ("bound", "change"), [({"minImprovement": 0.0}, 0.0), ({"minImprovement": 0.2}, -0.2), ({"maxIncrease": 0.3}, 0.3)]
)
def test_a_model_at_the_bound_passes_wrongly_in_2_5_percent_and_is_decided_in_5(bound: dict[str, object], change: float) -> None:
    """Its true change is the bound itself: whatever is not Inconclusive is chance, as likely to be for it as against it."""
    generator = np.random.default_rng(11)
    found = verdicts(bound, "task/loss", lambda: losses(generator, change), share=False)
    assert within(found["Passed"], 0.025), found
    assert within(found["Passed"] + found["Failed"], 0.05), found


def test_a_share_at_the_bound_passes_wrongly_in_2_5_percent() -> None:
    generator = np.random.default_rng(12)
    bound = {"minImprovement": RIGHT_AFTER - RIGHT_BEFORE}
    found = verdicts(bound, "task/exactMatch", lambda: matches(generator), share=True)
    assert within(found["Passed"], 0.025), found
    assert within(found["Passed"] + found["Failed"], 0.05), found


def test_a_model_that_is_worse_than_the_bound_passes_less_often() -> None:
    """By one standard error: 0.5 / sqrt(60). It passes where chance is off by 1.96 + 1 of them, 1.5 of 1,000."""
    generator = np.random.default_rng(13)
    found = verdicts({"minImprovement": 0.1}, "task/loss", lambda: losses(generator, -0.1 + 0.5 / CASES**0.5), share=False)
    assert found["Passed"] <= stats.binom.ppf(0.999, SUITES, stats.norm.sf(2.96))


def test_a_model_beyond_the_bound_passes_as_often_as_the_closed_form_says() -> None:
    """Beyond it by 2.8 standard errors, four of five pass: what the documents' table of examples is made with."""
    generator = np.random.default_rng(14)
    beyond = 2.8 * 0.5 / CASES**0.5
    found = verdicts({"minImprovement": 0.1}, "task/loss", lambda: losses(generator, -0.1 - beyond), share=False)
    # Student's t with 59 degrees of freedom, whose bound is 2.0 and not 1.96
    assert within(found["Passed"], float(stats.nct.sf(stats.t.ppf(0.975, CASES - 1), CASES - 1, 2.8))), found
    assert found["Failed"] == 0


def test_the_documents_table_of_examples_is_worked_out_by_the_closed_forms() -> None:
    """1.96 standard errors to an end of the interval, and 0.84 more for four of five: 2.8."""
    text = (Path(__file__).parents[3] / "docs/closed-loop.md").read_text(encoding="utf-8")
    deviations = (0.3, 0.4, 0.5)
    for width in (0.2, 0.1, 0.05):
        cells = [math.ceil((reach * deviation / width) ** 2 - 1e-9) for reach in (1.96, 2.8) for deviation in deviations]
        assert f"| {width} | {' | '.join(map(str, cells))} |" in text
    for bound, needed in ((0.8, 17), (0.9, 36), (0.95, 72)):
        assert 0.025 ** (1 / needed) >= bound > 0.025 ** (1 / (needed - 1))
        assert f"`atLeast: {bound}`" in text
    assert stats.norm.ppf(0.975) + stats.norm.ppf(0.8) == pytest.approx(2.8, abs=0.01)
