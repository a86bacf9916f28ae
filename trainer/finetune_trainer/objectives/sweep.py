"""A look at every example of a split, without gradients: each worker at its share, in the pieces that it computes at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from finetune_api.v1alpha1 import Training
from finetune_trainer.data.batches import Row, rows_of
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.shares import Sharing
from finetune_trainer.data.tensors import MicroBatch, collate
from finetune_trainer.model import CausalModel
from finetune_trainer.remedy import Remedy
from finetune_trainer.worker import Worker

T = TypeVar("T")


def sharing_of(model: CausalModel, worker: Worker) -> Sharing:
    """How rows are shared out where this model is computed with."""
    return Sharing(worker.rank, worker.world, together=model.sharded, padded=model.layout == "padded")


def sweep(
    model: CausalModel,
    named: tuple[str, Examples],
    training: Training,
    worker: Worker,
    remedy: Remedy,
    see: Callable[[MicroBatch], T],
) -> Iterator[T]:
    """What `see` makes of each micro-batch of this worker's share of a split, which is given by name and examples.

    The model is to be in evaluation mode. `remedy` says how much is held at once. Raises JobError as it does.
    """
    split, examples = named
    sharing, lengths = sharing_of(model, worker), examples.lengths() + model.virtual_tokens
    pieces = sharing.pieces(rows_of(examples, training), lengths, remedy.limit)

    def taken(rows: Sequence[Row]) -> int:
        return remedy.limit.taken(rows, lengths, padded=sharing.padded)

    def seen(rows: Sequence[Row]) -> T:
        with torch.no_grad():
            return see(collate(examples, rows, model.layout, split).to(worker.device))

    for _, made in remedy.each([piece.rows for piece in pieces if not piece.idle], taken, seen):
        yield made
    for _ in remedy.each([piece.rows for piece in pieces if piece.idle], taken, seen):
        pass  # for the other workers alone
