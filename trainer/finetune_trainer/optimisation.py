"""The optimiser's side of a step: learning rate, gradients in one buffer, moments by name."""

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Training
from finetune_trainer.errors import JobError
from finetune_trainer.parts import is_sharded, local_part, own_rows
from finetune_trainer.worker import Worker

NamedParameters = list[tuple[str, torch.nn.Parameter]]


class Saved(Protocol):
    """A saved tensor that is read when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its whole shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its number format."""
        ...

    def whole(self) -> torch.Tensor:
        """All of it."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """These rows of its first dimension; all of it where it has none."""
        ...


DECAY_SHARE = 0.2
"""Share of the steps in which warmupStableDecay falls (Hägele et al. 2024)."""
INVERSE_SQRT_STEPS = 10_000
"""Steps after which inverseSqrt without a warm-up has fallen by the root of two; with one it counts in warm-ups."""


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """The learning rate of a step, counted from 0: a linear rise over the warm-up, then the scheduler's course."""
    warmup = math.ceil(training.warmup_ratio * total_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    return training.learning_rate * _course(training.scheduler, step, warmup, total_steps)


def _course(scheduler: str, step: int, warmup: int, total_steps: int) -> float:
    """The share of the peak at a step after the warm-up."""
    done = (step - warmup) / max(1, total_steps - warmup)
    if scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if scheduler == "linear":
        return 1 - done
    if scheduler == "warmupStableDecay":
        decay = min(math.ceil(DECAY_SHARE * total_steps), total_steps - warmup)
        return min(1.0, (total_steps - step) / max(1, decay))
    if scheduler == "inverseSqrt":
        scale = warmup or INVERSE_SQRT_STEPS
        return math.sqrt(scale / (step - warmup + scale))
    return 1.0


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step's randomness (dropout) on one worker, so that a step can be repeated without the ones before it."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63


def adamw(parameters: NamedParameters, training: Training) -> torch.optim.AdamW:
    """AdamW over the trained parameters; vectors (biases, norms) do not decay.

    Sharded parameters are groups of their own: one fused step takes no others beside them (what an objective trains is never sharded).
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for _, parameter in parameters:
        groups.setdefault((parameter.ndim >= 2, is_sharded(parameter)), []).append(parameter)
    given = [{"params": group, "weight_decay": training.weight_decay if decays else 0.0} for (decays, _), group in groups.items()]
    return torch.optim.AdamW(given, lr=training.learning_rate, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments_of(optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> dict[str, torch.Tensor]:
    """The optimiser's state, as `<parameter>/<moment>`; empty before the first step."""
    return {f"{name}/{moment}": value for name, parameter in parameters for moment, value in optimizer.state.get(parameter, {}).items()}


def restore(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, saved: Mapping[str, Saved], moments: Mapping[str, Saved]
) -> None:
    """Put saved parameters and moments in place, one tensor at a time and of each only what this worker holds.

    Raises JobError (CheckpointIncompatible) naming what does not fit.
    """
    restore_parameters(parameters, saved)
    own = dict(parameters)
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        if value.shape and value.shape == tuple(own[name].shape):
            state = torch.zeros_like(own[name], dtype=value.dtype)
            local_part(state).copy_(value.rows(*own_rows(own[name])))
        else:
            state = value.whole().to(own[name].device)
        optimizer.state[own[name]][moment] = state


def restore_parameters(parameters: NamedParameters, saved: Mapping[str, Saved]) -> None:
    """The same for the parameters alone."""
    own = dict(parameters)
    missing, surplus = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    other = sorted(name for name in own.keys() & saved.keys() if tuple(own[name].shape) != saved[name].shape)
    for what, names in (("lacks", missing), ("has the unknown", surplus), ("has another shape of", other)):
        if names:
            raise JobError(Reason.CHECKPOINT_INCOMPATIBLE, f"the checkpoint {what} {names[0]} ({len(names)} such parameters)")
    with torch.no_grad():
        for name, parameter in parameters:
            local_part(parameter).copy_(saved[name].rows(*own_rows(parameter)))


class Gradients:
    """All gradients as views of one flat buffer for each number format, so that one all-reduce sums them without a copy.

    The float32 buffer ends in a few numbers of the step itself, which so need no all-reduce of their own. Gradients of sharded parameters
    are no part of it: the backward pass sums them over the workers and leaves each its part.
    """

    SIGNALS = 7
    """Numbers of the step: their meaning is the caller's."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {torch.float32: []}
        self._sharded: list[torch.nn.Parameter] = []
        for parameter in parameters:
            if is_sharded(parameter):
                self._sharded.append(parameter)
            else:
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
        for parameter in self._sharded:
            parameter.grad = None

    def sum_over(self, worker: Worker) -> None:
        """Replace gradients and signals by their sums over the workers."""
        for buffer, _ in self._buffers:
            worker.all_reduce(buffer)

    def clip(self, largest: float, worker: Worker) -> torch.Tensor:
        """Scale all gradients so that their norm is at most `largest` (0: leave them). Returns the norm before."""
        parts = [local_part(parameter.grad) for parameter in self._sharded if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(gradients, dtype=torch.float32) for _, gradients in self._buffers]
        if self._sharded:
            squares = torch.zeros(1, device=self.signals.device)
            for part in parts:
                squares += torch.linalg.vector_norm(part, dtype=torch.float32) ** 2
            worker.all_reduce(squares)
            norms.append(squares[0].sqrt())
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if largest > 0:
            scale = (largest / (norm + 1e-6)).clamp(max=1.0)
            for gradients in (*(gradients for _, gradients in self._buffers), *parts):
                gradients.mul_(scale)
        return torch.as_tensor(norm)
