"""A look at every example of a split, without gradients: each worker at its share, in the pieces that it computes at once."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from finetune_api.estimate import AUTO_TOKENS
from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Training
from finetune_trainer.data.batches import rows_of
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.shares import Limit, Piece, Sharing
from finetune_trainer.data.tensors import MicroBatch, collate
from finetune_trainer.errors import JobError
from finetune_trainer.model import CausalModel
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
    limit: Limit | None,
    see: Callable[[MicroBatch], T],
) -> Iterator[T]:
    """What `see` makes of each micro-batch of this worker's share of a split, which is given by name and examples.

    The model is to be in evaluation mode. `limit` is what a worker holds at once, where that is not what the training asks for. A piece
    that does not fit into memory is computed in halves. Raises JobError (GPUOutOfMemory) where a single row does not fit.
    """
    split, examples = named
    limit = limit or Limit(training.micro_batch_size, model.auto_tokens or AUTO_TOKENS[worker.device.type])
    waiting = sharing_of(model, worker).pieces(rows_of(examples, training), examples.lengths() + model.virtual_tokens, limit)[::-1]
    while waiting:
        piece = waiting.pop()
        try:
            with torch.no_grad():
                seen = see(collate(examples, piece.rows, model.layout, split).to(worker.device))
        except torch.OutOfMemoryError as error:
            if len(piece.rows) == 1:
                raise JobError(Reason.GPU_OUT_OF_MEMORY, "a single sequence does not fit into the memory of a worker") from error
            if model.sharded:  # the others wait for this one's part of a layer
                raise
            middle = len(piece.rows) // 2
            waiting += [Piece(piece.rows[middle:]), Piece(piece.rows[:middle])]
            continue
        if not piece.idle:
            yield seen
