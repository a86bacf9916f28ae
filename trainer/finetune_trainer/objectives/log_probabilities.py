"""How probable a model finds each example: the sum of the log-probabilities of its labelled tokens.

As in `sft`, the output layer is computed a chunk at a time and its logits are never there at once. But what an objective makes of these
sums, and with it the weight of every token's gradient, is known only when all of them are. Where the output layer is frozen, as most
methods leave it, that changes nothing: the gradient by a hidden state is computed in the same pass, and its weight put on afterwards.
Where it trains, its own gradient adds up over the tokens, so the logits are computed a second time on the way back.
"""

from typing import Any

import torch
from torch.nn import functional

from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives.linear_score import cap_in_place, chunks


def example_log_probabilities(model: CausalModel, batch: MicroBatch) -> torch.Tensor:
    """The log-probability of the labels of each example of the batch, in order: float64 [N], with gradients.

    Of a long answer the sum is large and the difference between two models small: float32 would lose some of its digits.
    """
    outputs = model.run(batch, logits=not model.plain_head)
    targets = batch.targets.view(-1)[batch.label_positions]
    if outputs.logits is not None:
        logits = outputs.logits.flatten(0, 1)[batch.label_positions].float()
        each = logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    else:
        assert outputs.last is not None  # noqa: S101 - one of the two is there
        head = model.head
        hidden = model.before_head(outputs.last.flatten(0, 1)[batch.label_positions])
        each = linear_log_probabilities(hidden, head.weight, head.bias, targets, model.precision, model.head_cap)
    return torch.stack([part.sum() for part in torch.split(each.double(), list(batch.document_labels))])


def linear_log_probabilities(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    precision: torch.dtype,
    cap: float | None = None,
) -> torch.Tensor:
    """The log-probability of each target under the softmax of `hidden @ weight.T + bias`, under a soft cap if there is one: float32 [N].

    hidden: [N, H]; weight: [V, H]; bias: [V]; targets: int64 [N]. The products are computed in `precision`, the rest in float32.
    """
    if not torch.is_grad_enabled():  # the function below sees what trains, not whether gradients are wanted
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    each: torch.Tensor = _LinearLogProbabilities.apply(hidden, weight, bias, targets, precision, cap)  # type: ignore[no-untyped-call]
    return each


class _LinearLogProbabilities(torch.autograd.Function):
    """Two ways to the gradient, by whether the output layer trains; see the module."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        precision: torch.dtype,
        cap: float | None,
    ) -> torch.Tensor:
        for_hidden, *for_head = ctx.needs_input_grad[:3]
        ctx.precision, ctx.cap, ctx.head_trains = precision, cap, any(for_head)
        slopes = torch.empty_like(hidden) if for_hidden and not ctx.head_trains else None
        each = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(each)
        with torch.autocast(hidden.device.type, enabled=False):
            for part, rows, matrix, offset in _chunks(hidden, weight, bias, precision):
                logits = functional.linear(rows, matrix, offset).float()
                by_products = cap_in_place(logits, cap)
                normaliser = logits.logsumexp(dim=1)
                normalisers[part] = normaliser
                each[part] = logits.gather(1, targets[part, None]).squeeze(1) - normaliser
                if slopes is not None:
                    slopes[part] = _slope(logits, normaliser, targets[part], by_products).to(precision) @ matrix
        ctx.save_for_backward(slopes, *((hidden, weight, bias, targets, normalisers) if ctx.head_trains else ()))
        return each

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        if not ctx.head_trains:
            (slopes,) = ctx.saved_tensors
            return None if slopes is None else slopes * scale[:, None].to(slopes.dtype), None, None, None, None, None
        _, hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        precision: torch.dtype = ctx.precision
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if for_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part, rows, matrix, offset in _chunks(hidden, weight, bias, precision):
                logits = functional.linear(rows, matrix, offset).float()
                by_products = cap_in_place(logits, ctx.cap)
                slope = _slope(logits, normalisers[part], targets[part], by_products).mul_(scale[part, None])
                if grad_bias is not None:
                    grad_bias += slope.sum(dim=0)
                slope = slope.to(precision)
                if grad_hidden is not None:
                    grad_hidden[part] = slope @ matrix
                if grad_weight is not None:
                    grad_weight += slope.T @ rows
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, precision: torch.dtype
) -> "list[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor | None]]":
    """Some rows at a time, and the output layer, in the number format of the products."""
    rows, matrix, offset = hidden.to(precision), weight.to(precision), None if bias is None else bias.to(precision)
    return [(part, rows[part], matrix, offset) for part in chunks(len(hidden), len(weight), hidden.device)]


def _slope(logits: torch.Tensor, normaliser: torch.Tensor, targets: torch.Tensor, by_products: torch.Tensor | None) -> torch.Tensor:
    """The gradient of each target's log-probability by the products [N, V] that the logits are made of, which it takes the place of."""
    slope = logits.sub_(normaliser[:, None]).exp_().neg_()
    slope.scatter_add_(1, targets[:, None], slope.new_ones(len(targets), 1))
    return slope if by_products is None else slope.mul_(by_products)
