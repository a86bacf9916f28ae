"""Logits under a soft cap, and an output layer that trains: in chunks, against torch's own gradients of the whole."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune_trainer.objectives import linear_score as module
from finetune_trainer.objectives.log_probabilities import linear_log_probabilities
from finetune_trainer.objectives.sft import linear_cross_entropy

ROWS, WIDTH, WORDS = 37, 6, 29


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of seven positions, pieces of two."""
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 7 * WORDS)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 2 * WORDS)


def layer(dtype: torch.dtype, *, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states, weight and, if wanted, bias, which all train; the targets."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(ROWS, WIDTH), (WORDS, WIDTH), *([(WORDS,)] if bias else [])]
    tensors = [(2 * torch.randn(shape, generator=generator, dtype=dtype)).requires_grad_() for shape in shapes]
    return tensors, torch.randint(0, WORDS, (ROWS,), generator=generator)


def capped_log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cap: float | None) -> torch.Tensor:
    """As it is written down (Gemma Team 2024, section 2)."""
    products = functional.linear(hidden, weight, bias)
    return (products if cap is None else cap * torch.tanh(products / cap)).log_softmax(dim=1)


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("cap", [None, 1.5, 30.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_cross_entropy_and_its_gradients(cap: float | None, bias: bool) -> None:
    tensors, targets = layer(torch.float64, bias=bias)
    hidden, weight, *rest = tensors
    offset = rest[0] if rest else None
    plain = -capped_log_probabilities(hidden, weight, offset, cap)[torch.arange(ROWS), targets].sum()
    expected = torch.autograd.grad(0.3 * plain, tensors)
    made = linear_cross_entropy(hidden, weight, offset, targets, torch.float64, cap)
    torch.testing.assert_close(made, plain, rtol=1e-9, atol=1e-9)
    for gradient, wanted in zip(torch.autograd.grad(0.3 * made, tensors), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("head_trains", [True, False])
def test_log_probabilities_and_their_gradients(cap: float | None, head_trains: bool) -> None:
    tensors, targets = layer(torch.float32, bias=True)
    hidden, weight, bias = tensors if head_trains else (tensors[0], *(each.detach() for each in tensors[1:]))
    trained = tensors if head_trains else tensors[:1]
    weights = torch.linspace(-1, 1, ROWS)
    each = capped_log_probabilities(hidden, weight, bias, cap)[torch.arange(ROWS), targets]
    expected = torch.autograd.grad((weights * each).sum(), trained)
    made = linear_log_probabilities(hidden, weight, bias, targets, torch.float32, cap)
    torch.testing.assert_close(made, each, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(torch.autograd.grad((weights * made).sum(), trained), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("make", [linear_cross_entropy, linear_log_probabilities])
def test_no_tensor_has_all_positions_of_all_words(make: Any) -> None:
    """With a head that trains and a cap, forward and back; the whole would be 37 times 29, a chunk is 7 times 29."""
    tensors, targets = layer(torch.float32, bias=True)
    with Largest() as seen:
        make(*tensors, targets, torch.float32, 1.5).sum().backward()
    assert tensors[1].grad is not None
    assert seen.elements <= max(7 * WORDS, ROWS * WIDTH)
