"""Which examples are held out of the training data: by the seed, and where rows belong together by whole groups of them. Pure."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from finetune_api.reasons import Reason
from finetune_trainer.data.examples import SPLITS
from finetune_trainer.errors import JobError

_HOLD_OUT = 1
"""Stream of random numbers that the held-out fractions are drawn from; the epochs draw from others."""

Sides = npt.NDArray[np.int8]
"""Which of SPLITS each example goes to; 0 is the training data."""


def held_out(count: int, fractions: Mapping[int, float], seed: int, keys: npt.NDArray[np.uint64] | None = None) -> Sides:
    """The side of each of so many examples: int8 [count], so large a fraction of them on each, and at least one on every side.

    `keys` [count] says which belong together: those with the same key are on one side, so the fractions are met as nearly as they let it
    be. A second fraction changes nothing of the first. Raises JobError (DatasetInvalid) where there are too few.
    """
    number = count if keys is None else len(np.unique(keys))
    if number <= len(fractions):
        raise JobError(Reason.DATASET_INVALID, _too_few(number, list(fractions), grouped=keys is not None))
    wanted, free = {}, count - 1
    for place, (side, fraction) in enumerate(fractions.items()):
        wanted[side] = min(max(1, round(count * fraction)), free - (len(fractions) - 1 - place))
        free -= wanted[side]
    order = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, _HOLD_OUT])).permutation(number)
    if keys is not None:
        return _by_keys(keys, wanted, order)
    sides, first = np.zeros(count, np.int8), 0
    for side, taken in wanted.items():
        sides[order[first : first + taken]] = side
        first += taken
    return sides


def _by_keys(keys: npt.NDArray[np.uint64], wanted: Mapping[int, int], order: npt.NDArray[np.int64]) -> Sides:
    """Whole groups, in the order that was drawn, each where it brings its side nearer to the number that is wanted."""
    _, group_of, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    side_of = np.zeros(len(sizes), np.int8)
    free = len(sizes)
    for place, (side, number) in enumerate(wanted.items()):
        spare = free - (len(wanted) - place)  # one group each for the sides that follow, and one to train on
        taken, groups = 0, 0
        for group in order:
            if taken >= number or groups == spare:
                break
            if side_of[group] == 0 and sizes[group] < 2 * (number - taken):
                side_of[group], taken, groups = side, taken + int(sizes[group]), groups + 1
        if not groups:  # each is more than twice what is wanted
            open_ = np.flatnonzero(side_of == 0)
            side_of[open_[np.argmin(sizes[open_])]], groups = side, 1
        free -= groups
    return side_of[group_of]


def _too_few(number: int, sides: Sequence[int], *, grouped: bool) -> str:
    one, several = ("value of data.groupBy", "values of data.groupBy") if grouped else ("example", "examples")
    these = f"one {one} is" if number == 1 else f"{number} {several} are"
    names = [SPLITS[side] for side in sides]
    sources = " and ".join(f"data.{name}.source" for name in names)
    return f"data.train: {these} too few to hold some out for {' and '.join(names)}; set {sources}"
