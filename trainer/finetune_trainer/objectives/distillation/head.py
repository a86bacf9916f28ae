"""The logits that a model has made, and a teacher's, a chunk at a time: beside `linear_score`, where the output layer is more than that."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from finetune_trainer.model import CausalModel, Outputs
from finetune_trainer.objectives.linear_score import Score, chunks, wide_of


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
            products = functional.linear(model.before_head(hidden[positions[part]]).to(model.precision), matrix, offset)
            return model.after_head(products.float())

    return made


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, score: Score) -> torch.Tensor:  # noqa: ANN401
        wide = wide_of(logits.dtype)
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=wide, device=logits.device)
        for part in chunks(len(logits), logits.shape[1], logits.device):
            value, slope = score(part, logits[part].to(wide))
            total += value
            gradient[part] = slope.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None
