"""The optimiser's side of a step: learning rate, gradients in one buffer, moments by name."""

import math
from collections.abc import Iterable

import torch

from finetune_api.v1alpha1 import Training
from finetune_trainer.worker import Worker

NamedParameters = list[tuple[str, torch.nn.Parameter]]


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """The learning rate of a step, counted from 0: a linear rise over the warm-up, then cosine, linear or constant."""
    warmup = math.ceil(training.warmup_ratio * total_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    if training.scheduler == "cosine":
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if training.scheduler == "linear":
        return training.learning_rate * (1 - done)
    return training.learning_rate


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step's randomness (dropout) on one worker, so that a step can be repeated without the ones before it."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63


def adamw(parameters: NamedParameters, training: Training) -> torch.optim.AdamW:
    """AdamW over the trained parameters; vectors (biases, norms) do not decay."""
    decaying = [parameter for _, parameter in parameters if parameter.ndim >= 2]
    others = [parameter for _, parameter in parameters if parameter.ndim < 2]
    groups = [{"params": decaying, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=training.learning_rate, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments_of(optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> dict[str, torch.Tensor]:
    """The optimiser's state, as `<parameter>/<moment>`; empty before the first step."""
    return {f"{name}/{moment}": value for name, parameter in parameters for moment, value in optimizer.state.get(parameter, {}).items()}


def load_moments(optimizer: torch.optim.Optimizer, parameters: NamedParameters, moments: dict[str, torch.Tensor]) -> None:
    """Put saved moments in place, each on its parameter's device."""
    names = {parameter: name for name, parameter in parameters}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        state.setdefault(ordered.index(name), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Gradients:
    """All gradients as views of one flat buffer for each number format, so that one all-reduce sums them without a copy.

    The float32 buffer ends in a few numbers of the step itself, which so need no all-reduce of their own.
    """

    SIGNALS = 3
    """Sum of the losses; whether to stop; whether to ask for preemptions."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {torch.float32: []}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self._buffers = []
        for dtype, group in by_dtype.items():
            extra = self.SIGNALS if dtype == torch.float32 else 0
            buffer = torch.zeros(sum(parameter.numel() for parameter in group) + extra, dtype=dtype, device=device)
            start = 0
            for parameter in group:
                parameter.grad = buffer[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
            self._buffers.append((buffer, buffer[:start]))
        self.signals = self._buffers[0][0][-self.SIGNALS :]

    def zero(self) -> None:
        """Begin a step."""
        for buffer, _ in self._buffers:
            buffer.zero_()

    def sum_over(self, worker: Worker) -> None:
        """Replace gradients and signals by their sums over the workers."""
        for buffer, _ in self._buffers:
            worker.all_reduce(buffer)

    def clip(self, largest: float) -> torch.Tensor:
        """Scale all gradients so that their norm is at most `largest` (0: leave them). Returns the norm before."""
        norms = [torch.linalg.vector_norm(gradients, dtype=torch.float32) for _, gradients in self._buffers]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if largest > 0:
            scale = (largest / (norm + 1e-6)).clamp(max=1.0)
            for _, gradients in self._buffers:
                gradients.mul_(scale)
        return torch.as_tensor(norm)
