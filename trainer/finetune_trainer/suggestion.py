"""Which values the next trial gets. Pure: it follows from the plan, the seed, the trial's number and what is known of the trials before.

So a search that is interrupted goes on as if it had not been, and with the same seed and the same outcomes the same values are tried.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune_api.search import SearchPlan
from finetune_trainer.search_space import Dimension, SearchSpace, Values, space_of
from finetune_trainer.trials import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

DRAWS = 50
"""Times that a point is drawn again where it was tried before."""
FEWEST_AT_RANDOM, MOST_AT_RANDOM = 3, 10
"""A quarter of the trials, within these bounds, are random, for the estimator to have something to go by."""


def suggested(plan: SearchPlan, seed: int, number: int, earlier: Sequence[Trial]) -> Values | None:
    """The values of trial `number`, which no earlier one had; None where every point was tried. `earlier` may still run."""
    space = space_of(plan)
    tried = {_key(trial.values) for trial in earlier}
    if space.size is not None and (plan.algorithm == "grid" or len(tried) >= space.size):
        return next((point for point in space.grid() if _key(point) not in tried), None)
    for draw in range(DRAWS):
        drawn = _seed(seed, number, draw)
        point = _by_estimator(plan, space, drawn, earlier) if plan.algorithm == "tpe" else _at_random(space, drawn)
        if _key(point) not in tried:
            return point
    return next((point for point in space.grid() if _key(point) not in tried), None) if space.size is not None else point


def _at_random(space: SearchSpace, seed: int) -> Values:
    source = random.Random(seed)  # noqa: S311 - nothing secret
    return space.at(tuple(source.random() for _ in space.dimensions))


def _by_estimator(plan: SearchPlan, space: SearchSpace, seed: int, earlier: Sequence[Trial]) -> Values:
    """By the tree-structured Parzen estimator (Bergstra et al. 2011), all parameters together (Falkner et al. 2018, BOHB).

    Its state is made anew from the trials each time. Trials that failed or still run count as the worst, so that their neighbourhood is
    left alone.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    at_random = min(MOST_AT_RANDOM, max(FEWEST_AT_RANDOM, plan.trials // 4))
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=at_random)
    study = optuna.create_study(sampler=sampler, direction="minimize" if plan.goal.mode == "min" else "maximize")
    distributions = {dimension.path: _distribution(dimension) for dimension in space.dimensions}
    study.add_trials([_frozen(trial, distributions, plan) for trial in earlier])
    found: dict[str, Any] = study.ask(fixed_distributions=distributions).params
    return {dimension.path: found[dimension.path] for dimension in space.dimensions}


def _distribution(dimension: Dimension) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.choices:
        return CategoricalDistribution(dimension.choices)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.logarithmic)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.logarithmic)


def _frozen(trial: Trial, distributions: dict[str, "BaseDistribution"], plan: SearchPlan) -> "FrozenTrial":
    """A trial as Optuna has it. One that was stopped early counts by the loss that it had come to, where that is what counts."""
    from optuna.trial import TrialState, create_trial

    states = {"Completed": TrialState.COMPLETE, "Running": TrialState.RUNNING, "Pruned": TrialState.PRUNED, "Failed": TrialState.PRUNED}
    comparable = trial.state == "Pruned" and plan.goal.metric == "validation/loss"
    course = {round(100 * share): loss for share, loss in trial.course} if comparable else {}
    return create_trial(
        state=states[trial.state],
        value=trial.value if trial.state == "Completed" else None,
        params=dict(trial.values),
        distributions=distributions,
        intermediate_values=course,
    )


def _seed(*parts: int) -> int:
    """A seed of its own for each draw of each trial, of 32 bits."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def _key(values: Values) -> tuple[tuple[str, object], ...]:
    return tuple(sorted(values.items()))
