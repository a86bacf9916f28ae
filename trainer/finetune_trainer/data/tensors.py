"""The tensors of a micro-batch, in one of two layouts.

flat: shape [1, T], all examples one after the other, no padding; attention keeps them apart by their boundaries (see attention.py).
padded: shape [B, T], one example a line, padded on the right, for models whose attention cannot be told about boundaries. With causal
attention no real token sees the padding, so neither layout needs a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """What a worker computes at once. All tensors are int64."""

    input_ids: torch.Tensor
    """[1, T] or [B, T]."""
    targets: torch.Tensor
    """[1, T] or [B, T]: the token that each position is to predict (already shifted: the next one of the same example), or IGNORED."""
    position_ids: torch.Tensor
    """[1, T] or [B, T]: place of each token in its own example."""
    label_positions: torch.Tensor
    """[L]: where in the flattened targets the labels stand. Made here, so that no device has to be waited for."""
    document_lengths: tuple[int, ...]
    """Tokens of each example, in order."""
    layout: Layout
    indices: tuple[int, ...] = ()
    """Index of each example in its split, in order."""
    row_documents: tuple[int, ...] = ()
    """Number of examples in each row, in order."""
    document_labels: tuple[int, ...] = ()
    """Labels of each example, in order."""
    split: str = "train"
    """Split that the indices are of."""

    @property
    def tokens(self) -> int:
        """Tokens of examples, padding not counted."""
        return sum(self.document_lengths)

    @property
    def labels(self) -> int:
        """Number of labels."""
        return len(self.label_positions)

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same on another device, copied without waiting."""
        names = ("input_ids", "targets", "position_ids", "label_positions")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def collate(examples: Examples, rows: Sequence[Row], layout: Layout, split: str = "train") -> MicroBatch:
    """The tensors of these rows of a split."""
    documents = [examples.example(index) for row in rows for index in row]
    lengths = tuple(len(tokens) for tokens, _ in documents)
    inputs = [tokens.astype(np.int64) for tokens, _ in documents]
    targets = [_targets(tokens, labelled) for tokens, (_, labelled) in zip(inputs, documents, strict=True)]
    if layout == "flat":
        input_ids, all_targets = np.concatenate(inputs)[None], np.concatenate(targets)[None]
        positions = np.concatenate([np.arange(length) for length in lengths])[None]
    else:
        input_ids, all_targets = _padded(inputs, 0), _padded(targets, IGNORED)
        # Also over the padding: positions that restart would be taken for packed examples.
        positions = np.tile(np.arange(input_ids.shape[1]), (len(lengths), 1))
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(all_targets),
        position_ids=torch.from_numpy(positions),
        label_positions=torch.from_numpy(np.flatnonzero(all_targets != IGNORED)),
        document_lengths=lengths,
        layout=layout,
        indices=tuple(index for row in rows for index in row),
        row_documents=tuple(map(len, rows)),
        document_labels=tuple(int(np.count_nonzero(each != IGNORED)) for each in targets),
        split=split,
    )


Ids = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def _targets(tokens: Ids, labelled: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Ids:
    """The next token where it is a label; the last position has none."""
    targets = np.full(len(tokens), IGNORED, dtype=np.int64)
    targets[:-1] = np.where(labelled[1:], tokens[1:], IGNORED)
    return targets


def _padded(parts: Sequence[Ids], fill: int) -> Ids:
    padded = np.full((len(parts), max(len(part) for part in parts)), fill, dtype=np.int64)
    for line, part in zip(padded, parts, strict=True):
        line[: len(part)] = part
    return padded
