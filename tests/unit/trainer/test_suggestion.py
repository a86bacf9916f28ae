"""Which values come next: the same ones again for the same seed and outcomes, whoever asks and however often."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest

from finetune_api.search import SearchPlan
from finetune_trainer.search_space import Values
from finetune_trainer.suggestion import suggested
from finetune_trainer.trials import Trial

RATE, RANK, WARMUP = "training.learningRate", "method.lora.rank", "training.warmupRatio"
SPACE = {RATE: {"logUniform": [1e-5, 1e-1]}, RANK: {"choice": [4, 8, 16]}, WARMUP: {"uniform": [0, 0.2]}}


def plan(algorithm: str, **given: Any) -> SearchPlan:
    return SearchPlan.model_validate_json(json.dumps({"parameters": SPACE, "trials": 40, "algorithm": algorithm, **given}))


def outcome(values: Values) -> float:
    """A goal whose smallest value is at a learning rate of 1e-3, rank 8."""
    return (math.log10(float(values[RATE])) + 3) ** 2 + (0.0 if values[RANK] == 8 else 0.5)


def searched(asked: SearchPlan, count: int, seed: int = 1, come: Callable[[Values], float] = outcome) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(1, count + 1):
        values = suggested(asked, seed, number, trials)
        assert values is not None
        trials.append(Trial(number, values, "Completed", come(values)))
    return trials


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_the_same_seed_gives_the_same_values_and_another_gives_others(algorithm: str) -> None:
    first = [trial.values for trial in searched(plan(algorithm), 15)]
    assert [trial.values for trial in searched(plan(algorithm), 15)] == first
    assert all(values not in first for values in (trial.values for trial in searched(plan(algorithm), 15, seed=2)))


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_the_order_of_the_manifest_does_not_matter(algorithm: str) -> None:
    turned = plan(algorithm, parameters=dict(reversed(SPACE.items())))
    assert [trial.values for trial in searched(turned, 8)] == [trial.values for trial in searched(plan(algorithm), 8)]


def test_a_range_by_logarithms_is_drawn_by_logarithms_and_a_choice_evenly() -> None:
    """Within four standard deviations of what the distributions say."""
    values = [trial.values for trial in searched(plan("random", trials=1000), 1000)]
    exponents = [math.log10(float(value[RATE])) for value in values]
    assert mean(exponents) == pytest.approx(-3, abs=4 * (4 / math.sqrt(12)) / math.sqrt(1000))
    assert mean(exponent < -4 for exponent in exponents) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 1000))
    assert mean(value[RANK] == 8 for value in values) == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / 1000))
    assert mean(float(value[WARMUP]) for value in values) == pytest.approx(0.1, abs=4 * 0.2 / math.sqrt(12) / math.sqrt(1000))
    assert {type(value[RANK]) for value in values} == {int}


def test_the_estimator_comes_closer_than_chance() -> None:
    """The mean of the last ten of forty trials, over five seeds: the estimator has learnt where the small values are."""
    late = {
        algorithm: mean(trial.value or 0.0 for seed in range(5) for trial in searched(plan(algorithm), 40, seed)[-10:])
        for algorithm in ("random", "tpe")
    }
    # Of chance it is the goal's mean: E[(u - 3)^2] over four decades is 16/12, and two thirds of 0.5.
    assert late["random"] == pytest.approx(16 / 12 + 1 / 3, rel=0.4)
    assert late["tpe"] < 0.4 * late["random"]


def test_the_largest_value_is_looked_for_where_it_is_best() -> None:
    highest = plan("tpe", goal={"metric": "task/exactMatch", "mode": "max"})
    late = searched(highest, 40, come=lambda values: -outcome(values))[-10:]
    assert mean(abs(math.log10(float(trial.values[RATE])) + 3) for trial in late) < 0.7


def test_the_neighbourhood_of_failed_trials_is_left() -> None:
    """All above a learning rate of 1e-3 diverge; below it the goal falls with the rate, towards the ones that fail."""
    trials: list[Trial] = []
    asked = plan("tpe")
    for number in range(1, 41):
        values = suggested(asked, 3, number, trials)
        assert values is not None
        failed = float(values[RATE]) > 1e-3
        state = Trial(number, values, "Failed", reason="TrainingDiverged") if failed else Trial(number, values, "Completed", 1.0)
        trials.append(state)
    assert mean(trial.state == "Failed" for trial in trials[10:]) < 0.25 < mean(trial.state == "Failed" for trial in trials[:10])


def test_trials_that_run_are_not_tried_beside_themselves() -> None:
    """Two at a time: the second one is another because the first one runs."""
    trials = searched(plan("tpe"), 12)
    running = Trial(13, suggested(plan("tpe"), 1, 13, trials) or {})
    beside = suggested(plan("tpe"), 1, 14, [*trials, running])
    assert beside is not None
    assert beside != running.values
    assert beside != suggested(plan("tpe"), 1, 14, trials)


def test_trials_that_were_ended_early_count_by_the_losses_that_they_had_come_to() -> None:
    """In the order of those losses: where all were ended early, as if they were the goal."""
    completed = searched(plan("tpe"), 12)

    def ended(sign: int) -> list[Trial]:
        return [replace(trial, state="Pruned", value=None, course=((0.25, sign * (trial.value or 0.0)),)) for trial in completed]

    assert suggested(plan("tpe"), 1, 13, ended(1)) == suggested(plan("tpe"), 1, 13, completed)
    assert suggested(plan("tpe"), 1, 13, ended(-1)) != suggested(plan("tpe"), 1, 13, completed)


def test_a_grid_is_gone_through_in_order() -> None:
    grid = plan("grid", parameters={RANK: {"choice": [8, 4]}, "training.epochs": {"choice": [1, 2]}})
    expected = [{RANK: rank, "training.epochs": epochs} for rank in (8, 4) for epochs in (1, 2)]
    assert [trial.values for trial in searched(grid, 4, come=lambda _: 0.0)] == expected
    assert suggested(grid, 1, 5, searched(grid, 4, come=lambda _: 0.0)) is None


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_no_point_is_tried_twice_and_all_are_tried(algorithm: str) -> None:
    few = plan(algorithm, trials=100, parameters={RANK: {"choice": [4, 8, 16]}, "training.epochs": {"uniform": [1, 3]}})
    trials = searched(few, 9, come=lambda values: float(values[RANK]))
    assert len({tuple(sorted(trial.values.items())) for trial in trials}) == 9
    assert suggested(few, 1, 10, trials) is None
