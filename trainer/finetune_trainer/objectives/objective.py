"""What every objective offers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch

from finetune_api.v1alpha1 import Training
from finetune_trainer.data.examples import Prepared
from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel
from finetune_trainer.remedy import TRAINING, Remedy, limit_of
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
    figures: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Sums of what else there is to say of held-out data, over the same units, by name: scalars without gradients."""


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


@runtime_checkable
class Learns(Protocol):
    """An objective that has parameters of its own to train. They are stepped and checkpointed like the model's, and never published."""

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters by name, in a fixed order; they follow from training.seed."""
        ...


@runtime_checkable
class Shows(Protocol):
    """An objective that has more to say of held-out data than its loss."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures that each LossSum has."""
        ...


def figures_of(objective: Objective) -> tuple[str, ...]:
    """The names of what an objective says of held-out data beside its loss: for most nothing."""
    return objective.figures if isinstance(objective, Shows) else ()


def parameters_of(objective: Objective) -> list[tuple[str, torch.nn.Parameter]]:
    """What an objective trains beside the model: for most nothing. Names begin with `objective.`, which no module's does."""
    own = objective.parameters() if isinstance(objective, Learns) else []
    return [(f"objective.{name}", parameter) for name, parameter in own]


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
    kept: Storage | None = None
    """Where what the teacher says of the training data is kept, or is to be, where the objective asks for that."""
    given: Remedy | None = None
    """How much of the model's own work a worker holds at once, where that is not what the training asks for."""

    @cached_property
    def remedy(self) -> Remedy:
        """How much that is."""
        return self.given or Remedy(TRAINING, self.model, limit_of(self.training, self.model))
