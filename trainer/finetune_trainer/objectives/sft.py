"""Supervised fine-tuning: the cross-entropy of the next token."""

from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives.objective import LossSum


class Sft:
    """The cross-entropy of every labelled token."""

    def loss(self, model: CausalModel, batch: MicroBatch) -> LossSum:
        """The sum over the labelled tokens."""
        raise NotImplementedError
