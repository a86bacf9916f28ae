"""The student's hidden states, and its attention maps, are drawn to the teacher's at the labelled positions.

Hidden states: the mean over their width of the squared difference, with a learned linear projection of the student's where widths differ
(Romero et al. 2015; Jiao et al. 2020). Attention maps: KL(teacher || student) of the row of each labelled position, the mean over heads
(Wang et al. 2020, MiniLM); where the numbers of heads differ, of the mean map of each model.
"""

import torch
from torch.nn import functional


def hidden_states(student: torch.Tensor, teacher: torch.Tensor, projection: torch.Tensor | None) -> torch.Tensor:
    """Sum over N positions of the mean squared difference: a float32 scalar.

    student: [N, H]; teacher: [N, G]; projection: [G, H], needed where H is not G.
    """
    mapped = student.float() if projection is None else functional.linear(student.float(), projection)
    return (mapped - teacher.float()).square().mean(dim=1).sum()


def attention_rows(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over N rows of KL(teacher || student), the mean over heads: a float32 scalar.

    student: [N, heads, T]; teacher: [N, heads of the teacher, T]; each row of T sums to one, with zeros where nothing is seen.
    """
    ours, theirs = student.float(), teacher.float()
    if ours.shape[1] != theirs.shape[1]:
        ours, theirs = ours.mean(dim=1, keepdim=True), theirs.mean(dim=1, keepdim=True)
    seen = theirs > 0
    smallest = torch.finfo(torch.float32).tiny
    ratio = theirs.clamp_min(smallest).log() - ours.clamp_min(smallest).log()
    return torch.where(seen, theirs * ratio, 0.0).sum(dim=2).mean(dim=1).sum()


def new_projection(width: int, target: int, seed: int, index: int, device: torch.device) -> torch.nn.Parameter:
    """A projection [target, width] that follows from the seed: normally distributed, keeping the states' size."""
    generator = torch.Generator().manual_seed((seed * 65_537 + index + 1) % 2**63)
    weights = torch.randn(target, width, generator=generator) * width**-0.5
    return torch.nn.Parameter(weights.to(device))
