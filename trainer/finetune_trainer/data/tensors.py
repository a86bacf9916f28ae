"""The tensors of a micro-batch, in one of two layouts.

flat: shape [1, T], all examples one after the other, no padding; attention keeps them apart by their boundaries (see attention.py).
padded: shape [B, T], one example a line, padded on the right, for models whose attention cannot be told about boundaries. With causal
attention no real token sees the padding, so neither layout needs a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from finetune_trainer.data.batches import Row
from finetune_trainer.data.examples import Examples

Layout = Literal["flat", "padded"]
IGNORED = -100
"""Target of a position whose prediction does not count."""


@dataclass(frozen=True)
class MicroBatch:
    """What a worker computes at once. All tensors are int64 and of one shape, [1, T] or [B, T]."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    """The token that each position is to predict (already shifted: the next one of the same example), or IGNORED."""
    position_ids: torch.Tensor
    """Place of each token in its own example."""
    document_lengths: tuple[int, ...]
    """Tokens of each example, in order."""
    layout: Layout
    labels: int
    """Targets that are not IGNORED."""

    @property
    def tokens(self) -> int:
        """Tokens of examples, padding not counted."""
        return sum(self.document_lengths)

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same on another device, copied without waiting."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        inputs, targets, positions = moved(self.input_ids), moved(self.targets), moved(self.position_ids)
        return MicroBatch(inputs, targets, positions, self.document_lengths, self.layout, self.labels)


def collate(examples: Examples, rows: Sequence[Row], layout: Layout) -> MicroBatch:
    """The tensors of these rows."""
    documents = [examples.example(index) for row in rows for index in row]
    lengths = tuple(len(tokens) for tokens, _ in documents)
    inputs = [tokens.astype(np.int64) for tokens, _ in documents]
    targets = [_targets(tokens, labelled) for tokens, labelled in zip(inputs, (labelled for _, labelled in documents), strict=True)]
    positions = [np.arange(length, dtype=np.int64) for length in lengths]
    shape = _flat if layout == "flat" else _padded
    return MicroBatch(
        input_ids=shape(inputs, 0),
        targets=shape(targets, IGNORED),
        position_ids=shape(positions, 0),
        document_lengths=lengths,
        layout=layout,
        labels=sum(int((target != IGNORED).sum()) for target in targets),
    )


Ids = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def _targets(tokens: Ids, labelled: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Ids:
    """The next token where it is a label; the last position has none."""
    targets = np.full(len(tokens), IGNORED, dtype=np.int64)
    targets[:-1] = np.where(labelled[1:], tokens[1:], IGNORED)
    return targets


def _flat(parts: Sequence[Ids], _: int) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts)).unsqueeze(0)


def _padded(parts: Sequence[Ids], fill: int) -> torch.Tensor:
    padded = np.full((len(parts), max(len(part) for part in parts)), fill, dtype=np.int64)
    for line, part in zip(padded, parts, strict=True):
        line[: len(part)] = part
    return torch.from_numpy(padded)
