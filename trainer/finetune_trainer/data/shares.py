"""What one worker has of a batch, in the pieces that it computes at once. Pure.

Every worker can work out every worker's pieces, so what depends on all of them needs no message.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.batches import Row, micro_batches, positions, rank_share


@dataclass(frozen=True)
class Limit:
    """How much a worker holds in memory at once: so many rows, or as many as fit into so many tokens; at least one row.

    Tokens are all that memory is taken for: padding and virtual tokens too.
    """

    size: int | Literal["auto"]
    """Rows, or auto."""
    tokens: int
    """Tokens where the size is auto."""

    def halved(self, largest: int) -> "Limit":
        """Half of what was too much: `largest` is what the largest piece has, by what the limit counts."""
        if self.size == "auto":
            return replace(self, tokens=max(1, min(self.tokens, largest) // 2))
        return replace(self, size=max(1, min(self.size, largest) // 2))

    def at_most(self, most: int) -> "Limit":
        """The same, or less where `most` is less."""
        if self.size == "auto":
            return replace(self, tokens=min(self.tokens, most))
        return replace(self, size=min(self.size, most))

    @property
    def most(self) -> int:
        """The number that it comes to: tokens or rows."""
        return self.tokens if self.size == "auto" else self.size

    def taken(self, rows: Sequence[Row], lengths: npt.NDArray[np.int64], *, padded: bool) -> int:
        """What rows that are computed at once come to, by what the limit counts."""
        return positions(rows, lengths, padded=padded) if self.size == "auto" else len(rows)

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.size == "auto" else f"{self.size} sequence{'s' if self.size > 1 else ''}"


@dataclass(frozen=True)
class Piece:
    """Rows that are computed at once."""

    rows: tuple[Row, ...]
    idle: bool = False
    """Computed only because another worker has one more piece: its loss does not count."""


@dataclass(frozen=True)
class Sharing:
    """How rows are shared out."""

    rank: int
    world: int
    together: bool = False
    """Whether all workers must compute equally many pieces, since they exchange parts of the model on the way."""
    padded: bool = False
    """Whether a piece's examples are lines of one length."""

    def pieces(self, rows: Sequence[Row], lengths: npt.NDArray[np.int64], limit: Limit) -> list[Piece]:
        """The worker's part of the rows; none where there are fewer rows than workers, unless they go together."""
        own = [Piece(piece) for piece in self._split(rows, lengths, limit, self.rank)]
        if self.together:
            most = max(sum(1 for _ in self._split(rows, lengths, limit, rank)) for rank in range(self.world))
            own += [Piece((rows[0],), idle=True)] * (most - len(own))
        return own

    def largest(self, rows: Sequence[Row], lengths: npt.NDArray[np.int64], limit: Limit) -> int:
        """What the largest piece that any worker has comes to, by what the limit counts."""
        every = (piece for rank in range(self.world) for piece in self._split(rows, lengths, limit, rank))
        return max(limit.taken(piece, lengths, padded=self.padded) for piece in every)

    def _split(self, rows: Sequence[Row], lengths: npt.NDArray[np.int64], limit: Limit, rank: int) -> Iterator[tuple[Row, ...]]:
        share = rank_share(rows, lengths, rank, self.world)
        return micro_batches(share, lengths, limit.size, limit.tokens, padded=self.padded)
