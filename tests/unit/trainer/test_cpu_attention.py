"""Attention by blocks on a CPU, in half precision, against the same in float64 with a mask."""

import pytest
import torch

from finetune_trainer.cpu_attention import BLOCK, KEPT, SHORT_BLOCK, causal_attention

WIDTH = 16
LENGTHS = [1, SHORT_BLOCK - 1, SHORT_BLOCK, SHORT_BLOCK + 1, KEPT, KEPT + 1, KEPT + BLOCK + 3]
"""One block and several, of documents whose probabilities are kept and of some whose are not."""


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(Q K' s) V, of what is not later."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    return (query @ key.transpose(2, 3) * scale).masked_fill(later, -torch.inf).softmax(dim=3) @ value


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (2, 2)])
def test_values_and_gradients(length: int, heads: int, key_heads: int) -> None:
    """The error is that of numbers with eight bits: a few thousandths of the whole tensor."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, WIDTH), (1, key_heads, length, WIDTH), (1, key_heads, length, WIDTH), (1, heads, length, WIDTH)]
    *inputs, slope = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    expected = plain(*exact, 0.25)
    wanted = [expected, *torch.autograd.grad(expected, exact, slope.double())]
    trained = [tensor.clone().requires_grad_() for tensor in inputs]
    output = causal_attention(*trained, 0.25)
    made = [output, *torch.autograd.grad(output, trained, slope)]
    for own, reference in zip(made, wanted, strict=True):
        assert own.dtype == torch.bfloat16
        assert (own.double() - reference).norm() <= 0.01 * reference.norm() + 1e-6
