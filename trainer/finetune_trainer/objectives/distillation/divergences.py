"""How far one distribution of the next token is from another, with its slope.

All take log-probabilities over the same outcomes, [N, C] each, of which every row sums to one, q being the student's and p the teacher's.
They return the divergence of each row, [N], and q * dD/dq, [N, C], up to a multiple of q: from that follows the slope in the student's
logits, since the logits of a softmax only ever move probability between outcomes (`slope_in_logits`).

    forwardKL       KL(p || q)                             Hinton et al. 2015
    reverseKL       KL(q || p)                             Gu et al. 2024 (MiniLLM)
    jensenShannon   KL(p || m) / 2 + KL(q || m) / 2        Agarwal et al. 2024 (generalised Jensen-Shannon, beta 0.5); m = (p + q) / 2

Outcomes that have no probability (-inf) add nothing.
"""

import math
from collections.abc import Callable, Mapping

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def forward_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q). dD/dq = -p / q."""
    p = log_p.exp()
    return _expected(p, log_p - log_q), p.neg_()


def reverse_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || p). dD/dq = log(q / p) + 1. Infinite where the student holds possible what the teacher does not."""
    flow = _weighted(log_q.exp(), log_q - log_p)
    return flow.sum(dim=1), flow


def jensen_shannon(log_q: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2. dD/dq = log(q / m) / 2."""
    log_m = torch.logaddexp(log_q, log_p).sub_(math.log(2))
    flow = _weighted(log_q.exp(), log_q - log_m).div_(2)
    return flow.sum(dim=1) + _expected(log_p.exp(), log_p - log_m) / 2, flow


DIVERGENCES: Mapping[str, Divergence] = {"forwardKL": forward_kl, "reverseKL": reverse_kl, "jensenShannon": jensen_shannon}
"""By their names in the API."""


def slope_in_logits(q: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """dD/dz where q = softmax(z): q * dD/dq less its sum's share, [N, C]. Overwrites `flow`."""
    return flow.sub_(q * flow.sum(dim=1, keepdim=True))


def _expected(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return _weighted(weights, values).sum(dim=1)


def _weighted(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The products, nothing where the weight is nothing."""
    return torch.where(weights > 0, weights * values, 0.0)
