"""What one worker has of a batch, in the pieces that it computes at once. Pure.

Every worker can work out every worker's pieces, so what depends on all of them needs no message.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.batches import Row, micro_batches, rank_share


@dataclass(frozen=True)
class Limit:
    """How much a worker holds in memory at once: so many rows, or as many as fit into so many tokens; at least one row."""

    size: int | Literal["auto"]
    """Rows, or auto."""
    tokens: int
    """Tokens where the size is auto."""

    def halved(self, largest: "Piece", lengths: npt.NDArray[np.int64]) -> "Limit":
        """Half of what was too much, where `largest` is the largest piece there was."""
        if self.size == "auto":
            return replace(self, tokens=max(1, min(self.tokens, largest.tokens(lengths)) // 2))
        return replace(self, size=max(1, min(self.size, len(largest.rows)) // 2))

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.size == "auto" else f"{self.size} sequence{'s' if self.size > 1 else ''}"


@dataclass(frozen=True)
class Piece:
    """Rows that are computed at once."""

    rows: tuple[Row, ...]
    idle: bool = False
    """Computed only because another worker has one more piece: its loss does not count."""

    def tokens(self, lengths: npt.NDArray[np.int64]) -> int:
        """Tokens of all rows."""
        return int(sum(lengths[list(row)].sum() for row in self.rows))


@dataclass(frozen=True)
class Sharing:
    """How rows are shared out."""

    rank: int
    world: int
    together: bool = False
    """Whether all workers must compute equally many pieces, since they exchange parts of the model on the way."""

    def pieces(self, rows: Sequence[Row], lengths: npt.NDArray[np.int64], limit: Limit) -> list[Piece]:
        """The worker's part of the rows; none where there are fewer rows than workers, unless they go together."""
        own = [Piece(piece) for piece in self._split(rows, lengths, limit, self.rank)]
        if self.together:
            most = max(sum(1 for _ in self._split(rows, lengths, limit, rank)) for rank in range(self.world))
            own += [Piece((rows[0],), idle=True)] * (most - len(own))
        return own

    def largest(self, rows: Sequence[Row], lengths: npt.NDArray[np.int64], limit: Limit) -> Piece:
        """The largest piece that any worker has, by what the limit counts."""
        every = (Piece(piece) for rank in range(self.world) for piece in self._split(rows, lengths, limit, rank))
        return max(every, key=lambda piece: piece.tokens(lengths) if limit.size == "auto" else len(piece.rows))

    def _split(self, rows: Sequence[Row], lengths: npt.NDArray[np.int64], limit: Limit, rank: int) -> Iterator[tuple[Row, ...]]:
        return micro_batches(rank_share(rows, lengths, rank, self.world), lengths, limit.size, limit.tokens)
