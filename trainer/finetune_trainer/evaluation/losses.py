"""Mean losses over examples that are not trained on, shared out over the workers."""

from collections.abc import Mapping

import torch

from finetune_api.v1alpha1 import Training
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives import Objective, figures_of
from finetune_trainer.objectives.sweep import sweep
from finetune_trainer.remedy import TRAINING, Remedy, limit_of
from finetune_trainer.worker import Worker

Losses = Mapping[str, float]
"""Mean loss per unit of the objective (for most a labelled token, in nats), by the split's name: `validation`.

What else the objective says of a split stands beside it, by a longer name: `validation/rewardAccuracy`.
"""


def metric_of(name: str) -> str:
    """The metric that people see for a name of Losses."""
    return name if "/" in name else f"{name}/loss"


def measure(
    model: CausalModel,
    objective: Objective,
    splits: Mapping[str, Examples],
    training: Training,
    worker: Worker,
    remedy: Remedy | None = None,
) -> Losses:
    """The mean loss of each split that has a label, and the objective's own figures. Every worker calls it and gets the same answer.

    `remedy` says how much a worker holds at once, where that is not what the training asks for. Raises JobError (GPUOutOfMemory) where a
    single row does not fit into memory, and JobError (WorkersLost) where all workers must begin anew.
    """
    remedy = remedy or Remedy(TRAINING, model, limit_of(training, model))
    found: dict[str, float] = {}
    was_training = model.module.training
    model.module.eval()
    for split, examples in splits.items():
        if examples.label_counts().sum() > 0:
            loss, figures = _means(model, objective, (split, examples), training, worker, remedy)
            found |= {split: loss, **{f"{split}/{name}": value for name, value in figures.items()}}
    model.module.train(was_training)
    return found


def _means(
    model: CausalModel, objective: Objective, named: tuple[str, Examples], training: Training, worker: Worker, remedy: Remedy
) -> tuple[float, dict[str, float]]:
    """The sums over all units of a split, over their number: each weighs the same, however the rows are shared out."""
    names = figures_of(objective)

    def see(batch: MicroBatch) -> torch.Tensor:
        loss = objective.loss(model, batch)
        return torch.stack([each.to("cpu", torch.float64) for each in (loss.total, *(loss.figures[name] for name in names))])

    sums = torch.zeros(2 + len(names), dtype=torch.float64)  # also of a worker that has no row: all of them add as many numbers
    for seen in sweep(model, named, training, worker, remedy, see):
        sums[1:] += seen
    sums[0] = remedy.mended
    sums = sums.to(worker.device)
    worker.all_reduce(sums)
    remedy.settle(worker, float(sums[0]))
    examples = named[1]
    count = examples.groups if objective.unit == "group" else int(examples.label_counts().sum())
    loss, *figures = (sums[1:] / count).tolist()
    return loss, dict(zip(names, figures, strict=True))
