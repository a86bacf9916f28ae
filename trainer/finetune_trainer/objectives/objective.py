"""What every objective offers."""

from dataclasses import dataclass
from typing import Protocol

import torch

from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel


@dataclass(frozen=True)
class LossSum:
    """A loss before it is divided, so that any split of a batch over workers and micro-batches gives the same gradient."""

    total: torch.Tensor
    """Sum over the labelled tokens: a float32 scalar that carries the gradient where gradients are on."""
    labels: int
    """Number of labelled tokens."""


class Objective(Protocol):
    """One thing to minimise."""

    def loss(self, model: CausalModel, batch: MicroBatch) -> LossSum:
        """The loss of a micro-batch that is on the model's device.

        The loop divides by the labels of the global batch, which `Batch.labels` knows on every worker, and goes backward:
        `(loss.total / batch.labels).backward()`; gradients are then summed, not averaged, over the workers.
        """
        ...
