"""Several indices together: reciprocal rank fusion (Cormack, Clarke and Büttcher 2009), which compares ranks, not scores. Pure."""

from collections import defaultdict
from collections.abc import Sequence

from finetune_trainer.retrieval.search import Hit, Index

_DAMPING = 60
"""The authors' constant: how little the first rank counts for more than the next."""
_DEEPER = 2
"""Hits of each index that are looked at for each that is wanted. With more, what both find late goes before what one finds first: on the
labelled set (tests/data/retrieval) recall at 5 is then 0.85 with MiniLM, not 0.91."""


class HybridIndex:
    """A text that several indices find stands before one that a single index finds, if its ranks are as good."""

    def __init__(self, indices: Sequence[Index]) -> None:
        self._indices = indices

    def search(self, queries: Sequence[str], most: int) -> list[tuple[Hit, ...]]:
        """See search.Index; the score is the sum of 1 / (60 + rank)."""
        lists = [index.search(queries, most * _DEEPER) for index in self._indices]
        return [fused(several, most) for several in zip(*lists, strict=True)]


def fused(rankings: Sequence[Sequence[Hit]], most: int) -> tuple[Hit, ...]:
    """The best of several rankings together; of equally good ones the one with the lower number first."""
    scores: defaultdict[int, float] = defaultdict(float)
    for ranking in rankings:
        for rank, hit in enumerate(ranking, 1):
            scores[hit.number] += 1 / (_DAMPING + rank)
    order = sorted(scores, key=lambda number: (-scores[number], number))
    return tuple(Hit(number, scores[number]) for number in order[:most])
