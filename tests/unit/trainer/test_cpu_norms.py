"""RMS norms a few rows at a time on a CPU: the formula's gradients, the models' own results, and no norm that is another formula."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from finetune_trainer import cpu_norms
from finetune_trainer.cpu_norms import _RmsNorm, use_cpu_norms

OWN = (LlamaRMSNorm, MixtralRMSNorm, Olmo2RMSNorm, Qwen3RMSNorm)
WIDTH = 24


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time, so that every tensor here is several pieces."""
    monkeypatch.setattr(cpu_norms, "PIECE_ELEMENTS", 2 * WIDTH)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_gradients_are_those_of_the_formula() -> None:
    x, weight = drawn(1, 5, WIDTH).double().requires_grad_(), drawn(WIDTH).double().requires_grad_()
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(_RmsNorm.apply(x, weight, 0.1), expected)
    assert torch.autograd.gradcheck(lambda *both: _RmsNorm.apply(*both, 0.1), (x, weight))


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_it_is_the_models_own_layer(kind: type[torch.nn.Module], *, trained: bool, dtype: torch.dtype, error: float) -> None:
    """Values and gradients, of rows in any order in memory and after a copy of the module."""
    own = kind(WIDTH, eps=1e-5)
    with torch.no_grad():
        own.weight.copy_(drawn(WIDTH))
    own = own.to(dtype).requires_grad_(trained)
    fast = copy.deepcopy(own)
    assert use_cpu_norms(torch.nn.Sequential(fast)) == 1
    fast = copy.deepcopy(fast)
    results = []
    for module in (own, fast):
        x = drawn(2, WIDTH, 5).to(dtype).transpose(1, 2).requires_grad_()
        y = module(x)
        y.backward(drawn(2, 5, WIDTH).to(dtype))
        results.append([y, x.grad, *([module.weight.grad] if trained else [])])
    for mine, theirs in zip(*reversed(results), strict=True):
        assert mine.dtype == theirs.dtype == dtype
        assert (mine - theirs).double().norm() <= error * theirs.double().norm()
    assert (fast.weight.grad is not None) == trained


def test_other_formulas_keep_their_own() -> None:
    """Gemma's weight counts from one, a layer norm takes the mean off, and one without a weight has nothing to scale by."""

    class Halved(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) / 2

    class Gated(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * gate

    others = [GemmaRMSNorm(WIDTH), torch.nn.LayerNorm(WIDTH, bias=False), torch.nn.LayerNorm(WIDTH), torch.nn.RMSNorm(WIDTH)]
    model = torch.nn.ModuleList([*others, Halved(WIDTH), Gated(WIDTH), torch.nn.Linear(WIDTH, WIDTH)])
    assert use_cpu_norms(model) == 0
    assert all("forward" not in vars(module) for module in model)


def test_what_else_is_asked_of_it_is_done_as_its_class_says() -> None:
    """A gate beside the rows, and rows in another number format than the weight's."""

    class Gated(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            made = super().forward(hidden_states)
            return made if gate is None else made * gate

    norm = Gated(WIDTH)
    x, gate = drawn(3, WIDTH), drawn(3, WIDTH)
    expected, wide = Gated.forward(norm, x, gate), Gated.forward(norm, x.bfloat16())
    assert use_cpu_norms(torch.nn.Sequential(norm)) == 1
    torch.testing.assert_close(norm(x, gate), expected, rtol=0, atol=0)
    torch.testing.assert_close(norm(x.bfloat16()), wide, rtol=0, atol=0)


@pytest.mark.parametrize(("architecture", "norms"), [("llama", 5), ("qwen3", 9), ("mistral", 5), ("gemma2", 0), ("gpt2", 0)])
def test_a_whole_model_is_what_it_was(architecture: str, norms: int) -> None:
    """Two norms a layer and one at the end; Qwen 3 has another two a layer, of queries and keys."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, num_key_value_heads=1, pad_token_id=0, **sizes)).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model(input_ids=ids).logits
    assert use_cpu_norms(model) == norms
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
