"""What every objective offers."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from finetune_api.v1alpha1 import Training
from finetune_trainer.data.examples import Prepared
from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

Unit = Literal["label", "group"]
"""What a mean is taken over: labelled tokens, or examples (a pair of preference data is one)."""


@dataclass(frozen=True)
class LossSum:
    """A loss before it is divided, so that any split of a batch over workers and micro-batches gives the same gradient."""

    total: torch.Tensor
    """Sum over the objective's units: a float32 scalar that carries the gradient where gradients are on."""
    count: int
    """Number of units."""


class Objective(Protocol):
    """One thing to minimise."""

    @property
    def unit(self) -> Unit:
        """What the loss is a mean over."""
        ...

    @property
    def measured(self) -> "Objective":
        """What held-out data is measured by, so that the figures can be compared with those of other jobs."""
        ...

    def loss(self, model: CausalModel, batch: MicroBatch) -> LossSum:
        """The loss of a micro-batch that is on the model's device.

        The loop divides by the units of the global batch, which its plan knows on every worker, and goes backward:
        `(loss.total / count).backward()`; gradients are then summed, not averaged, over the workers.
        """
        ...


@dataclass(frozen=True)
class Context:
    """What an objective may look at before the training begins. The model is the untuned one then."""

    model: CausalModel
    data: Prepared
    training: Training
    storage: Storage
    """The job's own folder in output.storage."""
    worker: Worker
    teacher: CausalModel | None = None
    """The teacher, in evaluation mode, where the objective has one that is a model."""
