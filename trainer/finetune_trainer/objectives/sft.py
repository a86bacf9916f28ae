"""Supervised fine-tuning: the cross-entropy of the next token.

The output layer is computed only where a label stands and a chunk at a time, with its gradient in the same pass (`linear_score`).
"""

import torch
from torch.nn import functional

from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel, Outputs
from finetune_trainer.objectives.linear_score import Logits, linear_score, probabilities_in_place
from finetune_trainer.objectives.objective import LossSum, Unit


class Sft:
    """The cross-entropy of every labelled token."""

    unit: Unit = "label"

    @property
    def measured(self) -> "Sft":
        """Itself."""
        return self

    def loss(self, model: CausalModel, batch: MicroBatch) -> LossSum:
        """The sum over the labelled tokens."""
        outputs = model.run(batch, logits=not model.plain_head)
        return LossSum(cross_entropy(model, outputs, batch), batch.labels)


def cross_entropy(model: CausalModel, outputs: Outputs, batch: MicroBatch) -> torch.Tensor:
    """Sum of the cross-entropies of the labelled tokens, a float32 scalar, from what the model made of the batch."""
    targets = batch.targets.view(-1)[batch.label_positions]
    if outputs.logits is not None:
        logits = outputs.logits.flatten(0, 1)[batch.label_positions]
        return functional.cross_entropy(logits.float(), targets, reduction="sum")
    assert outputs.last is not None  # noqa: S101 - one of the two is there
    head, hidden = model.head, model.before_head(outputs.last.flatten(0, 1)[batch.label_positions])
    return linear_cross_entropy(hidden, head.weight, head.bias, targets, model.precision, model.head_cap)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    precision: torch.dtype,
    cap: float | None = None,
) -> torch.Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T + bias`, under a soft cap if there is one, against `targets`: a float32 scalar.

    hidden: [N, H]; weight: [V, H]; bias: [V]; targets: int64 [N]. The products are computed in `precision`, the loss in float32.
    """
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))

    def score(part: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = targets[part, None]
        of_targets = logits.gather(1, chosen)
        if not wanted:
            return (logits.logsumexp(dim=1, keepdim=True) - of_targets).sum(), logits
        value = (probabilities_in_place(logits) - of_targets).sum()
        return value, logits.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=logits.dtype))

    return linear_score(hidden, weight, bias, Logits(precision, cap, light=True), score)
