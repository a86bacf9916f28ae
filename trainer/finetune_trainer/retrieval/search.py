"""What a search finds, and how indices rank. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Hit:
    """One text that was found: its number in the index, and how well it fits; scores of different indices cannot be compared."""

    number: int
    score: float


class Index(Protocol):
    """Texts that can be searched."""

    def search(self, queries: Sequence[str], most: int) -> list[tuple[Hit, ...]]:
        """For each query, so many hits at most, the best first; of equally good ones the earlier text first."""
        ...


def best(scores: Scores, most: int, above: float = -np.inf) -> tuple[Hit, ...]:
    """The highest of float [N] that are higher than `above`, in order; of equal ones the first."""
    if len(scores) > most:
        least = np.partition(scores, -most)[-most]
        places = np.flatnonzero((scores >= least) & (scores > above))
    else:
        places = np.flatnonzero(scores > above)
    order = places[np.argsort(-scores[places], kind="stable")][:most]
    return tuple(Hit(int(place), float(scores[place])) for place in order)
