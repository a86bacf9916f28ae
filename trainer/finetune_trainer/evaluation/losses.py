"""Mean losses over examples that are not trained on, shared out over the workers."""

from collections.abc import Mapping

import torch

from finetune_api.v1alpha1 import Training
from finetune_trainer.data.batches import AUTO_TOKENS, micro_batches, rank_share, rows_of
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.tensors import collate
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives import Objective
from finetune_trainer.worker import Worker

Losses = Mapping[str, float]
"""Mean loss per unit of the objective (for most a labelled token, in nats), by the split's name."""


def measure(model: CausalModel, objective: Objective, splits: Mapping[str, Examples], training: Training, worker: Worker) -> Losses:
    """The mean loss of each split that has a label. Every worker calls it and gets the same answer."""
    return {
        name: mean_loss(model, objective, examples, training, worker)
        for name, examples in splits.items()
        if examples.label_counts().sum() > 0
    }


def mean_loss(model: CausalModel, objective: Objective, examples: Examples, training: Training, worker: Worker) -> float:
    """The sum of the losses of all units, over their number: each weighs the same, however the rows are shared out."""
    lengths = examples.lengths()
    share = rank_share(rows_of(examples, training), lengths, worker.rank, worker.world)
    total = torch.zeros((), dtype=torch.float64)
    was_training = model.module.training
    model.module.eval()
    with torch.no_grad():
        for rows in micro_batches(share, lengths, training.micro_batch_size, AUTO_TOKENS[worker.device.type]):
            batch = collate(examples, rows, model.layout).to(worker.device)
            total += objective.loss(model, batch).total.to("cpu", torch.float64)
    model.module.train(was_training)
    count = examples.groups if objective.unit == "group" else int(examples.label_counts().sum())
    return worker.sum(float(total)) / count
