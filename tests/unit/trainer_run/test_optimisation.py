"""Learning rates by hand, gradients in one buffer, moments by name."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import get_inverse_sqrt_schedule, get_wsd_schedule

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Training
from finetune_trainer.errors import JobError
from finetune_trainer.optimisation import Gradients, adamw, learning_rate, moments_of, restore, step_seed
from finetune_trainer.worker import Worker


def training(**fields: Any) -> Training:
    return Training(**fields)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        # 10 steps, 20 % warm-up: 2 steps of rise, then 8 of the course; peak 1.
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        # The last 20 %, 2 steps, fall; and the peak over the root of the steps since the beginning, in warm-ups.
        ("warmupStableDecay", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]),
        ("inverseSqrt", [0.5, 1, 1, 0.81650, 0.70711, 0.63246, 0.57735, 0.53452, 0.5, 0.47140]),
        ("cosine", [0.5, 1, 1, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806]),
    ],
)
def test_the_course_of_the_learning_rate(scheduler: str, expected: list[float]) -> None:
    spec = training(learning_rate=1.0, warmup_ratio=0.2, scheduler=scheduler)
    assert [learning_rate(step, 10, spec) for step in range(10)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scheduler", ["warmupStableDecay", "inverseSqrt"])
@pytest.mark.parametrize(("total", "warmup"), [(50, 0), (50, 5), (7, 3)])
def test_the_course_is_that_of_transformers(scheduler: str, total: int, warmup: int) -> None:
    """After the warm-up: there the rise begins at zero, here at its first step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    if scheduler == "inverseSqrt":
        reference = get_inverse_sqrt_schedule(optimizer, warmup)
    else:
        fall = -(-total // 5)
        reference = get_wsd_schedule(optimizer, warmup, fall, num_training_steps=total, decay_type="linear")
    spec = training(learning_rate=1.0, warmup_ratio=warmup / total, scheduler=scheduler)
    for step in range(total):
        if step >= warmup:
            assert learning_rate(step, total, spec) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


def test_no_warm_up_begins_at_the_peak() -> None:
    assert learning_rate(0, 10, training(learning_rate=0.3, warmup_ratio=0.0)) == 0.3


def test_all_warm_up_ends_at_the_peak() -> None:
    assert learning_rate(9, 10, training(learning_rate=0.3, warmup_ratio=1.0)) == pytest.approx(0.3)


def test_seeds_differ_by_step_and_rank() -> None:
    seeds = {step_seed(42, step, rank) for step in range(200) for rank in range(64)}
    assert len(seeds) == 200 * 64


def two_parameters() -> list[tuple[str, torch.nn.Parameter]]:
    return [("matrix", torch.nn.Parameter(torch.ones(2, 3))), ("vector", torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)))]


def test_backward_fills_the_buffers() -> None:
    named = two_parameters()
    gradients = Gradients([parameter for _, parameter in named], torch.device("cpu"))
    (named[0][1].sum() * 2 + named[1][1].sum().float() * 3).backward()
    summed: list[list[float]] = []
    gradients.sum_over(Worker(all_reduce=lambda tensor: summed.append(tensor.tolist())))
    assert summed == [[2.0] * 6 + [0.0] * 7, [3.0] * 4]
    gradients.zero()
    assert named[0][1].grad is not None
    assert named[0][1].grad.abs().sum() == 0


def test_clipping_scales_all_to_the_norm() -> None:
    named = two_parameters()
    gradients = Gradients([parameter for _, parameter in named], torch.device("cpu"))
    (named[0][1].sum() * 2 + named[1][1].sum().float() * 3).backward()
    norm = math.sqrt(6 * 4 + 4 * 9)
    assert gradients.clip(1.0, Worker()).item() == pytest.approx(norm)
    assert named[0][1].grad is not None
    assert named[0][1].grad[0, 0].item() == pytest.approx(2 / norm)


def test_zero_means_no_clipping_and_the_signals_do_not_count() -> None:
    named = two_parameters()[:1]
    gradients = Gradients([parameter for _, parameter in named], torch.device("cpu"))
    gradients.signals[:] = torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    named[0][1].sum().backward()
    assert gradients.clip(0.0, Worker()).item() == pytest.approx(math.sqrt(6))
    assert named[0][1].grad is not None
    assert named[0][1].grad.unique().tolist() == [1.0]


@dataclass(frozen=True)
class Whole:
    """A saved tensor that is in memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def whole(self) -> torch.Tensor:
        return self.tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor[start:stop]


def saved(tensors: dict[str, torch.Tensor]) -> dict[str, Whole]:
    return {name: Whole(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"matrix": torch.ones(2, 3)}, "lacks vector"),
        ({"matrix": torch.ones(2, 3), "vector": torch.ones(4), "more": torch.ones(1)}, "has the unknown more"),
        ({"matrix": torch.ones(3, 2), "vector": torch.ones(4)}, "has another shape of matrix"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tensors: dict[str, torch.Tensor], message: str) -> None:
    named = two_parameters()
    with pytest.raises(JobError, match=message) as caught:
        restore(adamw(named, training()), named, saved(tensors), {})
    assert caught.value.reason == Reason.CHECKPOINT_INCOMPATIBLE


def test_moments_come_back_to_their_parameters() -> None:
    """After loading, the next step is the one that would have come."""

    def one_step(named: list[tuple[str, torch.nn.Parameter]], optimizer: torch.optim.Optimizer) -> None:
        for index, (_, parameter) in enumerate(named):
            parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
        optimizer.step()

    first = [("matrix", torch.nn.Parameter(torch.ones(2, 3))), ("vector", torch.nn.Parameter(torch.ones(4)))]
    optimizer = adamw(first, training(weight_decay=0.1))
    one_step(first, optimizer)
    weights = {name: parameter.detach().clone() for name, parameter in first}
    moments = {name: value.clone() for name, value in moments_of(optimizer, first).items()}
    assert sorted(moments) == [f"{name}/{moment}" for name in ("matrix", "vector") for moment in ("exp_avg", "exp_avg_sq", "step")]
    one_step(first, optimizer)

    second = [(name, torch.nn.Parameter(torch.zeros_like(value))) for name, value in weights.items()]
    again = adamw(second, training(weight_decay=0.1))
    restore(again, second, saved(weights), saved(moments))
    one_step(second, again)
    for (_, expected), (_, actual) in zip(first, second, strict=True):
        assert torch.equal(expected, actual)


def test_vectors_do_not_decay() -> None:
    named = [("matrix", torch.nn.Parameter(torch.ones(2, 3))), ("vector", torch.nn.Parameter(torch.ones(4)))]
    decays = {group["weight_decay"]: len(group["params"]) for group in adamw(named, training(weight_decay=0.1)).param_groups}
    assert decays == {0.1: 1, 0.0: 1}
