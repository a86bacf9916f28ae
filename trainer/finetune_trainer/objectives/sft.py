"""Supervised fine-tuning: the cross-entropy of the next token.

The output layer is computed only where a label stands and a chunk at a time, with its gradient in the same pass: the logits of a whole
micro-batch, by far the largest tensor of a step, never exist.
"""

from typing import Any

import torch
from torch.nn import functional

from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel, Outputs
from finetune_trainer.objectives.objective import LossSum, Unit

CHUNK = 1024
"""Positions whose logits exist at once."""


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
    return linear_cross_entropy(hidden, head.weight, head.bias, targets, model.precision)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, precision: torch.dtype
) -> torch.Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T + bias` against `targets`: a float32 scalar.

    hidden: [N, H]; weight: [V, H]; bias: [V]; targets: int64 [N]. The products are computed in `precision`, the loss in float32.
    """
    if not torch.is_grad_enabled():  # the function below sees what trains, not whether gradients are wanted
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    total: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, precision)  # type: ignore[no-untyped-call]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients of the sum are known with the logits at hand, so they are computed then and only scaled on the way back."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        precision: torch.dtype,
    ) -> torch.Tensor:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if for_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            rows, matrix = hidden.to(precision), weight.to(precision)
            offset = None if bias is None else bias.to(precision)
            for start in range(0, len(targets), CHUNK):
                part = slice(start, start + CHUNK)
                logits = functional.linear(rows[part], matrix, offset).float()
                chosen = targets[part, None]
                normaliser = logits.logsumexp(dim=1, keepdim=True)
                total += (normaliser - logits.gather(1, chosen)).sum()
                if not (for_hidden or for_weight or for_bias):
                    continue
                slope = logits.sub_(normaliser).exp_().scatter_add_(1, chosen, chosen.new_full(chosen.shape, -1, dtype=torch.float32))
                if grad_bias is not None:
                    grad_bias += slope.sum(dim=0)
                slope = slope.to(precision)
                if grad_hidden is not None:
                    grad_hidden[part] = slope @ matrix
                if grad_weight is not None:
                    grad_weight += slope.T @ rows[part]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(weight_dtype),
            None if grad_bias is None else (grad_bias * scale).to(bias_dtype),
            None,
            None,
        )
