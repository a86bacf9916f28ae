"""The student's distribution of the next token is drawn to the teacher's: the scores that `head` sums over labelled positions.

The teacher's distribution is either its whole one (`whole`), or its k most probable tokens and the mass of all others as one outcome
(`largest`), as they are kept in the storage or come from an endpoint. A divergence between such coarser distributions is at most that
between the whole ones, and equal to it where k is the whole vocabulary. Both are taken at a temperature, and multiplied by its square so
that the gradient's size does not depend on it (Hinton et al. 2015, section 2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from finetune_trainer.objectives.distillation.divergences import DIVERGENCES, Divergence, slope_in_logits
from finetune_trainer.objectives.linear_score import Score


@dataclass(frozen=True)
class Response:
    """How much a divergence weighs, and which."""

    weight: float
    divergence: Divergence
    temperature: float

    @classmethod
    def named(cls, weight: float, divergence: str, temperature: float) -> "Response":
        """By the divergence's name in the API."""
        return cls(weight, DIVERGENCES[divergence], temperature)


@dataclass(frozen=True)
class Largest:
    """The teacher's k most probable tokens at each of N positions, at the temperature that they are used with."""

    ids: torch.Tensor
    """int64 [N, k]. Where there are fewer than k, one of them again."""
    log_probabilities: torch.Tensor
    """float32 [N, k + 1]: of these tokens (-inf where there are fewer than k), then of all others together. A row sums to one."""


def cross_entropy(weight: float, targets: torch.Tensor) -> Score:
    """The labels' own loss: -log q(target), by its weight."""

    def score(part: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = targets[part, None]
        normaliser = logits.logsumexp(dim=1, keepdim=True)
        value = (normaliser - logits.gather(1, chosen)).sum()
        slope = (logits - normaliser).exp_()
        slope.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=slope.dtype))
        return value * weight, slope.mul_(weight)

    return score


def whole(form: Response, teacher_logits: Callable[[slice], torch.Tensor]) -> Score:
    """The divergence from the teacher's whole distribution. `teacher_logits` gives those of a range of positions, float32 [n, V].

    One model's output layer may have more rows than the other's, though their tokens are the same: it is filled up to some round number.
    What only one has is left out.
    """

    def score(part: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        taught = teacher_logits(part)
        common = min(logits.shape[1], taught.shape[1])
        log_q = (logits[:, :common] / form.temperature).log_softmax(dim=1)
        log_p = (taught[:, :common] / form.temperature).log_softmax(dim=1)
        value, flow = form.divergence(log_q, log_p)
        slope = slope_in_logits(log_q.exp_(), flow).mul_(form.weight * form.temperature)
        if common < logits.shape[1]:
            slope = torch.nn.functional.pad(slope, (0, logits.shape[1] - common))
        return value.sum() * (form.weight * form.temperature**2), slope

    return score


def largest(form: Response, taught: Largest) -> Score:
    """The divergence from the teacher's k most probable tokens and the rest."""

    def score(part: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, log_p = taught.ids[part], taught.log_probabilities[part]
        log_q = (logits / form.temperature).log_softmax(dim=1)
        named = log_q.gather(1, ids).masked_fill(log_p[:, :-1].isneginf(), -torch.inf)
        rest = _log_rest(log_q, ids)
        value, flow = form.divergence(torch.cat([named, rest], dim=1), log_p)
        # What flows to the rest is shared out among its tokens by their probability; then the named ones get their own.
        slope = (log_q - rest).exp_().mul_(flow[:, -1:])
        slope.scatter_(1, ids, 0.0).scatter_add_(1, ids, flow[:, :-1])
        slope.sub_(log_q.exp_().mul_(flow.sum(dim=1, keepdim=True))).mul_(form.weight * form.temperature)
        return value.sum() * (form.weight * form.temperature**2), slope

    return score


def _log_rest(log_q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The logarithm of the mass of all tokens but these, [n, 1]: summed, since one minus the others' would lose a small one."""
    return log_q.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)


def together(*scores: Score) -> Score:
    """The sum of scores over the same logits."""

    def score(part: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (value, slope), *others = (each(part, logits) for each in scores)
        for more, further in others:
            value, slope = value + more, slope.add_(further)
        return value, slope

    return score
