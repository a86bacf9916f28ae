"""Relations among vectors: what the student's hidden states are to one another is drawn to what the teacher's are.

    distance     Euclidean distances of two, each divided by their mean, by the Huber loss          Park et al. 2019 (RKD-D, eq. 4 to 6)
    angle        cosines of the angle at each of three, by the Huber loss                           Park et al. 2019 (RKD-A, eq. 7 and 8)
    similarity   inner products of all with all, each row scaled to length one, squared difference  Tung and Mori 2019 (eq. 3 and 4)

Each is a mean over pairs, triples or entries, so it does not depend on how many vectors there are nor on their width. Distances and angles
are taken of different vectors only. Triples grow with the third power of the vectors, and pairs with the second: of more than LARGEST_*
vectors so many are taken, evenly spaced from the first to the last.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

LARGEST_ANGLE = 32
"""Vectors that angles are taken among: 29,760 triples."""
LARGEST_PAIR = 256
"""Vectors that distances and similarities are taken among."""
_SAME = 1e-8
"""Squared distance, as a part of the mean one, below which two vectors are the same and have no direction."""


@dataclass(frozen=True)
class Relations:
    """How much each relation weighs."""

    distance: float
    angle: float
    similarity: float

    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The weighted sum for n vectors of each model, [n, H] and [n, G]: a float32 scalar, 0 where there are too few."""
        student, teacher = student.float(), teacher.float()
        near, far = evenly(len(student), LARGEST_ANGLE), evenly(len(student), LARGEST_PAIR)
        total = student.new_zeros(())
        if self.distance and len(student) >= 2:
            total = total + self.distance * distance(student[far], teacher[far])
        if self.angle and len(student) >= 3:
            total = total + self.angle * angle(student[near], teacher[near])
        if self.similarity and len(student) >= 2:
            total = total + self.similarity * similarity(student[far], teacher[far])
        return total


def evenly(count: int, largest: int) -> slice | list[int]:
    """Which of `count` things are taken where at most `largest` are: all, or evenly spaced ones with the first and the last."""
    if count <= largest:
        return slice(None)
    return [place * (count - 1) // (largest - 1) for place in range(largest)]


def distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """RKD-D, the mean over pairs of different vectors. n >= 2."""
    return functional.huber_loss(_scaled_distances(student), _scaled_distances(teacher))


def angle(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """RKD-A, the mean over triples of different vectors. n >= 3."""
    n = len(student)
    line = torch.arange(n, device=student.device)
    at, one, other = torch.meshgrid(line, line, line, indexing="ij")
    different = (at != one) & (at != other) & (one != other)
    return functional.huber_loss(_cosines(student)[different], _cosines(teacher)[different])


def similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Tung and Mori's loss: the squared Frobenius norm of the difference of the similarity matrices, divided by n squared."""
    ours, theirs = (functional.normalize(vectors @ vectors.T, dim=1) for vectors in (student, teacher))
    return (ours - theirs).square().mean()


def _scaled_distances(vectors: torch.Tensor) -> torch.Tensor:
    """The distances of the n (n - 1) / 2 pairs, divided by their mean. The gradient between two that are the same is nothing."""
    every = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")  # by products, near ones would lose their digits
    first, second = torch.triu_indices(len(vectors), len(vectors), offset=1, device=vectors.device)
    distances = every[first, second]
    mean = distances.mean()
    return distances / torch.where(mean > 0, mean, 1.0)


def _cosines(vectors: torch.Tensor) -> torch.Tensor:
    """[n, n, n]: at [j, i, k] the cosine of the angle at vector j between those to i and to k; 0 where there is none."""
    differences = vectors[None, :, :] - vectors[:, None, :]
    squares = differences.square().sum(dim=2)
    same = squares <= _SAME * squares.detach().mean()
    scale = torch.where(same, 1.0, squares).rsqrt()  # where they are the same, a root that has a gradient
    directions = torch.where(same[..., None], 0.0, differences * scale[..., None])
    return directions @ directions.mT
