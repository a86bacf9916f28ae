"""A sum over the logits of labelled positions, a chunk at a time, with its gradient in the same pass.

The slope in the logits is known with the logits at hand: it is turned into gradients of the hidden states and of the output layer at
once, so that the logits of a whole micro-batch, by far the largest tensor of a step, never exist.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from finetune_api.estimate import CHUNK, CHUNK_ELEMENTS

PIECE_ELEMENTS = 1 << 18
"""Logits that a light score takes at once on a CPU: 1 MiB in float32, so that it passes over them in the nearest cache."""
Score = Callable[[slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From a range of positions and their logits, float32 [n, V], to the sum of their losses and its slope in the logits, [n, V].

Only a score that stands alone may overwrite the logits.
"""


@dataclass(frozen=True)
class Logits:
    """How logits are made of the output layer's products, and looked at."""

    precision: torch.dtype
    """Number format of the products."""
    cap: float | None = None
    """The soft cap: a product x becomes cap * tanh(x / cap)."""
    light: bool = False
    """Whether the score does little for each position, so that it may be asked for a few of them at a time."""


def linear_score(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, made: Logits, score: Score) -> torch.Tensor:
    """The sum of a score over the logits `hidden @ weight.T + bias`, capped if so said: a float32 scalar.

    hidden: [N, H]; weight: [V, H]; bias: [V]. The score is computed in float32 at least.
    """
    if not torch.is_grad_enabled():  # the function below sees what trains, not whether gradients are wanted
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    total: torch.Tensor = _LinearScore.apply(hidden, weight, bias, made, score)  # type: ignore[no-untyped-call]
    return total


def chunks(rows: int, width: int, device: torch.device) -> list[slice]:
    """The ranges that `rows` positions of `width` logits are computed in on a device."""
    size = max(1, min(CHUNK, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // width))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def cap_in_place(products: torch.Tensor, cap: float | None) -> torch.Tensor | None:
    """Turn products into logits under a soft cap, where they are. Returns the slope of the logits in the products; None without a cap."""
    if cap is None:
        return None
    bent = products.div_(cap).tanh_().clone()
    products.mul_(cap)
    return bent.square_().neg_().add_(1)


def probabilities_in_place(logits: torch.Tensor) -> torch.Tensor:
    """Turn logits [n, V] into the probabilities of their softmax, where they are. Returns the logarithms of the normalisers, [n, 1]."""
    peak = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)
    logits.div_(total)
    return total.log_().add_(peak)


def wide_of(precision: torch.dtype) -> torch.dtype:
    """The number format of a loss whose products are computed in `precision`."""
    return torch.promote_types(precision, torch.float32)


def _pieces(part: slice, width: int, device: torch.device, made: Logits) -> list[slice]:
    """The ranges that a score is asked for, of a range of positions whose products are there."""
    size = max(1, PIECE_ELEMENTS // width) if made.light and device.type == "cpu" else CHUNK
    return [slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]


class _LinearScore(torch.autograd.Function):
    """The gradients of the sum are known with the logits at hand, so they are computed then and only scaled on the way back."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        made: Logits,
        score: Score,
    ) -> torch.Tensor:
        precision, wide = made.precision, wide_of(made.precision)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if for_bias and bias is not None else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            rows, matrix = hidden.to(precision), weight.to(precision)
            offset = None if bias is None else bias.to(precision)
            for part in chunks(len(hidden), len(weight), hidden.device):
                # Some positions at a time the products give way to the slopes in them.
                products = functional.linear(rows[part], matrix, offset)
                for few in _pieces(part, len(weight), hidden.device, made):
                    own = slice(few.start - part.start, few.stop - part.start)
                    logits = products[own].to(wide)
                    by_products = cap_in_place(logits, made.cap)
                    value, slope = score(few, logits)
                    total += value
                    if by_products is not None:
                        slope = slope.mul_(by_products)
                    if grad_bias is not None:
                        grad_bias += slope.sum(dim=0)
                    if for_hidden or for_weight:
                        products[own] = slope
                if grad_hidden is not None:
                    grad_hidden[part] = products @ matrix
                if grad_weight is not None:
                    grad_weight += products.T @ rows[part]
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
