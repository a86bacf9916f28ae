"""Mean losses over examples that are not trained on, shared out over the workers."""

from collections.abc import Mapping

import torch

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Training
from finetune_trainer.data.batches import AUTO_TOKENS, rows_of
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.shares import Limit, Piece, Sharing
from finetune_trainer.data.tensors import collate
from finetune_trainer.errors import JobError
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives import Objective
from finetune_trainer.worker import Worker

Losses = Mapping[str, float]
"""Mean loss per unit of the objective (for most a labelled token, in nats), by the split's name."""


def measure(
    model: CausalModel,
    objective: Objective,
    splits: Mapping[str, Examples],
    training: Training,
    worker: Worker,
    limit: Limit | None = None,
) -> Losses:
    """The mean loss of each split that has a label. Every worker calls it and gets the same answer.

    `limit` is what a worker holds at once, where that is not what the training asks for.
    """
    limit = limit or Limit(training.micro_batch_size, AUTO_TOKENS[worker.device.type])
    return {
        name: mean_loss(model, objective, examples, training, worker, limit)
        for name, examples in splits.items()
        if examples.label_counts().sum() > 0
    }


def mean_loss(model: CausalModel, objective: Objective, examples: Examples, training: Training, worker: Worker, limit: Limit) -> float:
    """The sum of the losses of all units, over their number: each weighs the same, however the rows are shared out.

    A piece that does not fit into memory is computed in halves. Raises JobError (GPUOutOfMemory) where a single row does not fit.
    """
    sharing = Sharing(worker.rank, worker.world, together=model.sharded)
    waiting = sharing.pieces(rows_of(examples, training), examples.lengths(), limit)[::-1]
    total = torch.zeros((), dtype=torch.float64)
    was_training = model.module.training
    model.module.eval()
    with torch.no_grad():
        while waiting:
            piece = waiting.pop()
            try:
                batch = collate(examples, piece.rows, model.layout).to(worker.device)
                loss = objective.loss(model, batch).total.to("cpu", torch.float64)
            except torch.OutOfMemoryError as error:
                if len(piece.rows) == 1:
                    raise JobError(Reason.GPU_OUT_OF_MEMORY, "a single sequence does not fit into the memory of a worker") from error
                if model.sharded:  # the others wait for this one's part of a layer
                    raise
                middle = len(piece.rows) // 2
                waiting += [Piece(piece.rows[middle:]), Piece(piece.rows[:middle])]
                continue
            total += 0.0 if piece.idle else loss
    model.module.train(was_training)
    count = examples.groups if objective.unit == "group" else int(examples.label_counts().sum())
    return worker.sum(float(total)) / count
