"""A loss over the logits of labelled positions, a chunk at a time, with its gradient in the same pass.

As for the cross-entropy (`sft.linear_cross_entropy`), the slope in the logits is known with the logits at hand: it is turned into
gradients of the hidden states and of the output layer at once, so that the logits of a micro-batch never exist, the teacher's neither.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from finetune_trainer.model import CausalModel, Outputs

CHUNK_ELEMENTS = 1 << 24
"""Logits that exist at once, of each model: 64 MiB in float32."""
CHUNK = 1024
"""Most positions at once."""
Score = Callable[[slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From a range of positions and their logits, float32 [n, V], to the sum of their losses and its slope in the logits, [n, V].

The logits must not be overwritten.
"""


def linear_score(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, precision: torch.dtype, score: Score
) -> torch.Tensor:
    """The sum of a score over the logits `hidden @ weight.T + bias`: a float32 scalar.

    hidden: [N, H]; weight: [V, H]; bias: [V]. The products are computed in `precision`, the score in float32 at least.
    """
    if not torch.is_grad_enabled():  # the function below sees what trains, not whether gradients are wanted
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    total: torch.Tensor = _LinearScore.apply(hidden, weight, bias, precision, score)  # type: ignore[no-untyped-call]
    return total


def score_logits(logits: torch.Tensor, score: Score) -> torch.Tensor:
    """The sum of a score over logits [N, V] that the model itself has made: a float32 scalar."""
    total: torch.Tensor = _Score.apply(logits, score)  # type: ignore[no-untyped-call]
    return total


def logits_at(model: CausalModel, outputs: Outputs, positions: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    """What gives a model's logits at a range of positions, float32 [n, V], from what it made of a batch. Without gradients.

    positions: int64 [N], in the flattened batch.
    """
    if outputs.logits is not None:
        logits = outputs.logits.flatten(0, 1)
        return lambda part: logits[positions[part]].float()
    assert outputs.last is not None  # noqa: S101 - one of the two is there
    hidden, head = outputs.last.flatten(0, 1), model.head
    matrix, offset = head.weight.to(model.precision), None if head.bias is None else head.bias.to(model.precision)

    def made(part: slice) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(model.before_head(hidden[positions[part]]).to(model.precision), matrix, offset).float()

    return made


def chunks(rows: int, width: int) -> list[slice]:
    """The ranges that `rows` positions of `width` logits are computed in."""
    size = max(1, min(CHUNK, CHUNK_ELEMENTS // width))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _wide(precision: torch.dtype) -> torch.dtype:
    """The number format of a loss whose products are computed in `precision`."""
    return torch.promote_types(precision, torch.float32)


class _LinearScore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        precision: torch.dtype,
        score: Score,
    ) -> torch.Tensor:
        wide = _wide(precision)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if for_bias and bias is not None else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            rows, matrix = hidden.to(precision), weight.to(precision)
            offset = None if bias is None else bias.to(precision)
            for part in chunks(len(hidden), len(weight)):
                value, slope = score(part, functional.linear(rows[part], matrix, offset).to(wide))
                total += value
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


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, score: Score) -> torch.Tensor:  # noqa: ANN401
        wide = _wide(logits.dtype)
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=wide, device=logits.device)
        for part in chunks(*logits.shape):
            value, slope = score(part, logits[part].to(wide))
            total += value
            gradient[part] = slope.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None
