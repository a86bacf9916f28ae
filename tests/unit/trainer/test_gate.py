"""Verdicts on gates, worked out by hand: value, interval, direction, and what was not measured."""

import math
from itertools import pairwise

import pytest
from scipy import stats

from finetune_api.baseline import Sufficient
from finetune_api.evaluation import Gate
from finetune_api.status import Evaluation, GateResult
from finetune_trainer.evaluation.intervals import interval_of, mean_of
from finetune_trainer.gate import Bounded, at_least, at_most, is_sufficient, judge

INF = math.inf


def gate(**fields: object) -> Gate:
    return Gate.model_validate({"metric": "task/exactMatch", **fields})


def judged(gate: Gate, known: Bounded | None) -> GateResult:
    """The verdict where the gate's value, or its change over what it names, is this."""
    values = {} if known is None or gate.over else {gate.metric: known}
    changes = {gate.over: {gate.metric: known}} if known is not None and gate.over else {}
    (found,) = judge([gate], values, changes)
    return found


@pytest.mark.parametrize(
    ("known", "verdict"),
    [
        (Bounded(0.9, 0.85, 0.94), "Passed"),
        (Bounded(0.85, 0.8, 0.9), "Passed"),  # the bound itself is kept to
        (Bounded(0.85, 0.79, 0.9), "Inconclusive"),
        (Bounded(0.75, 0.6, 0.81), "Inconclusive"),
        (Bounded(0.75, 0.6, 0.8), "Inconclusive"),  # it may be exactly at the bound
        (Bounded(0.7, 0.6, 0.79), "Failed"),
        (Bounded(0.8), "Passed"),  # no interval: the value decides
        (Bounded(0.79), "Failed"),
        (Bounded(0.1 + 0.7, 0.1 + 0.7, 0.1 + 0.7), "Passed"),  # 0.7999999999999999
        (Bounded(0.9, -INF, INF), "Inconclusive"),  # one case
        (Bounded(None), "Inconclusive"),
        (Bounded(None, -INF, INF), "Inconclusive"),
        (Bounded(INF), "Inconclusive"),
        (Bounded(math.nan), "Inconclusive"),
    ],
)
def test_at_least(known: Bounded, verdict: str) -> None:
    assert judged(gate(atLeast=0.8), known).verdict == verdict


@pytest.mark.parametrize(
    ("known", "verdict"),
    [
        (Bounded(0.3, 0.2, 0.5), "Passed"),
        (Bounded(0.45, 0.4, 0.51), "Inconclusive"),
        (Bounded(0.6, 0.51, 0.7), "Failed"),
        (Bounded(0.5), "Passed"),
        (Bounded(0.51), "Failed"),
        (Bounded(-2.0), "Passed"),
    ],
)
def test_at_most(known: Bounded, verdict: str) -> None:
    assert judged(gate(metric="train/gap", atMost=0.5), known).verdict == verdict


@pytest.mark.parametrize(
    ("metric", "change", "verdict", "observed"),
    [
        ("task/exactMatch", Bounded(0.2, 0.06, 0.3), "Passed", 0.2),
        ("task/exactMatch", Bounded(0.2, 0.04, 0.3), "Inconclusive", 0.2),
        ("task/exactMatch", Bounded(-0.2, -0.3, -0.1), "Failed", -0.2),
        ("task/loss", Bounded(-0.2, -0.3, -0.06), "Passed", 0.2),  # a loss improves by falling
        ("task/perplexity", Bounded(-0.2, -0.3, -0.04), "Inconclusive", 0.2),
        ("train/gap", Bounded(0.2, 0.1, 0.3), "Failed", -0.2),
        ("general/hellaswag", Bounded(0.2, 0.1, 0.3), "Passed", 0.2),
    ],
)
def test_min_improvement_is_towards_the_better(metric: str, change: Bounded, verdict: str, observed: float) -> None:
    found = judged(gate(metric=metric, minImprovement=0.05, over="baseline"), change)
    assert (found.verdict, found.observed, found.over) == (verdict, observed, "baseline")


def test_an_improvement_tells_its_interval_in_its_own_direction() -> None:
    found = judged(gate(metric="task/loss", minImprovement=0.05, over="other-job"), Bounded(-0.2, -0.3, -0.06))
    assert found.to_json() == {
        "metric": "task/loss",
        "verdict": "Passed",
        "observed": 0.2,
        "low": 0.06,
        "high": 0.3,
        "required": "better by at least 0.05",
        "over": "other-job",
    }


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (Bounded(-0.4, -0.5, -0.3), "Passed"),
        (Bounded(0.02, -0.01, 0.05), "Passed"),
        (Bounded(0.04, 0.01, 0.07), "Inconclusive"),
        (Bounded(0.4, 0.3, 0.5), "Failed"),
    ],
)
def test_max_increase_is_of_the_value_itself(change: Bounded, verdict: str) -> None:
    found = judged(gate(metric="retention/loss", maxIncrease=0.05, over="baseline"), change)
    assert (found.verdict, found.required) == (verdict, "larger by at most 0.05")


@pytest.mark.parametrize(
    "bound", [{"atLeast": 0.0}, {"atMost": 0.0}, {"minImprovement": 0.0, "over": "baseline"}, {"maxIncrease": 0.0, "over": "baseline"}]
)
def test_a_bound_of_zero_is_one(bound: dict[str, object]) -> None:
    metric = "task/loss" if "maxIncrease" in bound or "atMost" in bound else "task/f1"
    good, bad = (Bounded(-0.5), Bounded(0.5)) if metric == "task/loss" else (Bounded(0.5), Bounded(-0.5))
    assert judged(gate(metric=metric, **bound), good).verdict == "Passed"
    assert judged(gate(metric=metric, **bound), bad).verdict == "Failed"


@pytest.mark.parametrize(
    "bound", [{"atLeast": 0.1}, {"atMost": 0.1}, {"minImprovement": 0.1, "over": "a"}, {"maxIncrease": 0.1, "over": "a"}]
)
def test_what_was_not_measured_is_inconclusive(bound: dict[str, object]) -> None:
    found = judged(gate(**bound), None)
    assert (found.verdict, found.observed, found.low) == ("Inconclusive", None, None)


def test_a_change_over_another_job_is_not_that_over_the_baseline() -> None:
    gates = [gate(minImprovement=0.1, over=over) for over in ("baseline", "other-job")]
    changes = {"baseline": {"task/exactMatch": Bounded(0.3)}, "other-job": {"task/exactMatch": Bounded(0.0)}}
    assert [each.verdict for each in judge(gates, {}, changes)] == ["Passed", "Failed"]


def test_the_status_tells_no_infinite_number() -> None:
    found = judged(gate(atLeast=0.8), Bounded(0.9, -INF, INF))
    assert found.to_json() == {"metric": "task/exactMatch", "verdict": "Inconclusive", "observed": 0.9, "required": "at least 0.8"}


@pytest.mark.parametrize(
    ("values", "verdict"), [((0.9, 0.9), "Passed"), ((0.9, 0.1), "Failed"), ((0.9, None), "Inconclusive"), ((0.1, None), "Failed")]
)
def test_one_gate_that_is_not_passed_is_enough(values: tuple[float, float | None], verdict: str) -> None:
    gates = [gate(metric=f"task/{name}", atLeast=0.5) for name in ("f1", "exactMatch")]
    found = judge(gates, {each.metric: Bounded(value) for each, value in zip(gates, values, strict=True)}, {})
    assert Evaluation(gates=found).gates_verdict == verdict


def test_a_higher_value_never_fails_where_a_lower_one_passed() -> None:
    order = ["Failed", "Inconclusive", "Passed"]
    for lower, higher in pairwise(value / 100 for value in range(100)):
        verdicts = [at_least(Bounded(value, value - 0.07, value + 0.04), 0.5) for value in (lower, higher)]
        assert order.index(verdicts[0]) <= order.index(verdicts[1])
        verdicts = [at_most(Bounded(value, value - 0.07, value + 0.04), 0.5) for value in (lower, higher)]
        assert order.index(verdicts[0]) >= order.index(verdicts[1])


def test_a_model_at_the_bound_passes_as_seldom_as_the_confidence_says() -> None:
    """A model that is right in 70 of 100, measured on 800 suites of 100 examples each, at a bound of 0.7: 10 % of them at 80 %."""
    passed = 0
    for right in stats.binom.rvs(100, 0.7, size=800, random_state=3):
        interval = interval_of(mean_of([1.0] * right + [0.0] * (100 - right), (0.0, 1.0)), 0.8, resamples=500)
        passed += at_least(Bounded(right / 100, interval.low, interval.high), 0.7) == "Passed"
    assert 0.05 <= passed / 800 <= 0.14


@pytest.mark.parametrize(
    ("goal", "known", "enough"),
    [
        ({"atLeast": 0.95}, Bounded(0.97, 0.95, 0.99), True),
        ({"atLeast": 0.95}, Bounded(0.97, 0.94, 0.99), False),  # perhaps a lucky prompt
        ({"atLeast": 0.95}, Bounded(None), False),
        ({"atMost": 0.0}, Bounded(-0.1, -0.2, 0.0), True),
        ({"atMost": 1.0}, Bounded(0.9, 0.8, 1.1), False),
    ],
)
def test_a_baseline_is_sufficient_only_for_sure(goal: dict[str, object], known: Bounded, enough: bool) -> None:
    assert is_sufficient(Sufficient.model_validate({"metric": "task/f1", **goal}), known) is enough
