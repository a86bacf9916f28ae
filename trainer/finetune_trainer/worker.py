"""One process among those that train together. The loop sees nothing else of how they are connected."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Worker:
    """One of `world` processes, each on a device of its own. Its functions are collective: every worker calls them at the same point.

    The defaults are those of a single process.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    all_reduce: Callable[[torch.Tensor], None] = lambda _: None
    """Replaces the tensor on each worker by the sum over all. Raises JobError(WorkersLost) where one of them is gone."""
    preempted: Callable[[], bool] = lambda: False
    """Whether the cluster is about to take one of the workers away; the same answer for all."""

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum over the workers."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.all_reduce(tensor)
        return float(tensor)

    def least(self, value: int) -> int:
        """The smallest of the workers' values."""
        values = torch.zeros(self.world, dtype=torch.float64, device=self.device)
        values[self.rank] = value
        self.all_reduce(values)
        return int(values.min())

    def agree(self, value: int) -> int:
        """The value of the worker that leads."""
        return int(self.sum(value if self.leads else 0))
