"""The loss against torch's and transformers' own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from finetune_api.estimate import CHUNK
from finetune_trainer.attention import choose_layout
from finetune_trainer.data.batches import rank_share
from finetune_trainer.data.examples import Examples, join
from finetune_trainer.data.tensors import IGNORED, Layout, collate
from finetune_trainer.model import CausalModel, head_scale
from finetune_trainer.objectives.log_probabilities import example_log_probabilities
from finetune_trainer.objectives.sft import Sft, linear_cross_entropy

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunks_are_the_plain_cross_entropy(rows: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    bias = torch.randn(11, generator=generator, requires_grad=True) if with_bias else None
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    targets = torch.randint(0, 11, (rows,), generator=generator)
    plain = functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="sum")
    expected = torch.autograd.grad(plain * 0.3, inputs)
    chunked = linear_cross_entropy(hidden, weight, bias, targets, torch.float32)
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-6)
    for gradient, reference in zip(torch.autograd.grad(chunked * 0.3, inputs), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6 * rows**0.5)


def test_two_tokens_by_hand() -> None:
    """Logits (0, ln 3) give the probabilities 1/4 and 3/4: the loss is ln 4 for the first token and ln 4/3 for the second."""
    hidden = torch.tensor([[1.0], [1.0]])
    weight = torch.tensor([[0.0], [np.log(3.0)]])
    total = linear_cross_entropy(hidden, weight, None, torch.tensor([0, 1]), torch.float32)
    assert float(total) == pytest.approx(np.log(4) + np.log(4 / 3), rel=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear_cross_entropy(hidden, weight, None, torch.tensor([0, 1, 2]), torch.float32).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bfloat16_products_stay_near_the_exact_loss() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(40, 32) * 0.1
    targets = torch.randint(0, 40, (64,))
    exact = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), None, targets, torch.bfloat16)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=0)


def llama(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes))


def causal(model: PreTrainedModel, layout: Layout | None = None) -> CausalModel:
    chosen = layout or choose_layout(model)
    return CausalModel(model, model, chosen, head_scale(model, chosen), torch.float32, CPU)


def examples() -> Examples:
    generator = np.random.default_rng(3)
    return join([(generator.integers(0, 50, n).astype(np.int32), generator.random(n) < 0.6) for n in (9, 4, 14, 6)])


def reference(model: PreTrainedModel, data: Examples) -> torch.Tensor:
    """transformers' loss of each example by itself, from a mean back to a sum."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    total = torch.zeros(())
    for index in range(len(data)):
        tokens, labelled = data.example(index)
        labels = torch.tensor(np.where(labelled, tokens, IGNORED)).long()[None]
        output = model(input_ids=torch.tensor(tokens).long()[None], labels=labels, use_cache=False)
        total = total + output.loss * int(labelled[1:].sum())
    model.set_attn_implementation(before)
    return total


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_and_its_gradients_are_transformers_own(layout: Layout, tied: bool) -> None:
    model, data = llama(tie_word_embeddings=tied), examples()
    expected = reference(model, data)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    wrapped = causal(model) if layout == "flat" else causal(model, "padded")
    assert wrapped.layout == layout
    assert wrapped.plain_head
    loss = Sft().loss(wrapped, collate(data, [(0, 1), (2, 3)], layout))
    assert loss.count == int(data.label_counts().sum())
    torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=1e-5)
    loss.total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("cap", [0.5, 30.0], ids=["binding", "as Gemma 2 has it"])
def test_a_head_that_caps_its_logits_is_computed_in_chunks(cap: float) -> None:
    """Whether the logits are large beside the cap or small, as of a model that has learnt nothing: a cap does not show then."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=cap, initializer_range=0.2)
    model, data = Gemma2ForCausalLM(config), examples()
    expected = reference(model, data)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    wrapped = causal(model)
    assert (wrapped.plain_head, wrapped.head_cap) == (True, cap)
    batch = collate(data, [(0, 1, 2, 3)], wrapped.layout)
    loss = Sft().loss(wrapped, batch)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-example_log_probabilities(wrapped, batch).sum().float(), expected, rtol=1e-5, atol=1e-4)
    loss.total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * float(gradients[name].abs().max()), msg=name)


def test_a_cap_that_the_model_does_not_keep_is_not_trusted() -> None:
    """The configuration names one, and the model has no such thing: then its own logits are the right ones."""
    model = llama()
    model.config.final_logit_softcapping = 30.0
    assert not causal(model).plain_head


ENDS = {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("make", "scale"),
    [
        (lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=6.0, initializer_range=0.2)), 1 / 6),
        (
            lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625, bos_token_id=1, eos_token_id=2, initializer_range=0.2)),
            0.0625,
        ),
    ],
    ids=["granite", "cohere"],
)
def test_a_head_that_multiplies_its_logits_is_computed_in_chunks(make: object, scale: float) -> None:
    torch.manual_seed(0)
    model, data = make(), examples()
    expected = reference(model, data)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    wrapped = causal(model)
    assert wrapped.plain_head
    assert wrapped.head_scale == pytest.approx(scale)
    batch = collate(data, [(0, 1), (2, 3)], wrapped.layout)
    loss = Sft().loss(wrapped, batch)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(-example_log_probabilities(wrapped, batch).sum().float(), expected, rtol=1e-5, atol=1e-4)
    loss.total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * float(gradients[name].abs().max()), msg=name)
    assert head_scale(model.to(torch.bfloat16), wrapped.layout) == pytest.approx(scale, rel=1e-2)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["float32 weights", "bfloat16 weights"])
def test_bfloat16_computation_stays_near_the_exact_loss(base: torch.dtype) -> None:
    """Both ways of computing in bfloat16: weights kept in float32 (full tuning) and in bfloat16 (a frozen base)."""
    data = examples()
    expected = reference(llama(), data)
    wrapped = causal(llama().to(base))
    assert (wrapped.layout, wrapped.plain_head) == ("flat", True)
    loss = Sft().loss(replace(wrapped, precision=torch.bfloat16), collate(data, [(0, 1), (2, 3)], "flat"))
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, expected, rtol=1e-2, atol=0)
    loss.total.backward()
    assert {parameter.grad.dtype for parameter in wrapped.trained_parameters()} == {base}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_any_split_of_a_batch_gives_the_same_gradient(world: int, packed: bool) -> None:
    model, data = llama(), examples()
    wrapped = causal(model)
    rows = ((0, 1), (2,), (3,)) if packed else ((0,), (1,), (2,), (3,))
    labels = int(data.label_counts().sum())
    Sft().loss(wrapped, collate(data, [(0, 1, 2, 3)], "flat")).total.div(labels).backward()
    whole = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    for rank in range(world):
        for row in rank_share(rows, data.lengths(), rank, world):
            Sft().loss(wrapped, collate(data, [row], "flat")).total.div(labels).backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, whole, rtol=1e-5, atol=1e-7)


def test_without_gradients_only_the_loss_is_computed() -> None:
    model, data = llama(), examples()
    with torch.no_grad():
        loss = Sft().loss(causal(model), collate(data, [(0,)], "flat"))
    assert not loss.total.requires_grad


def test_without_gradients_a_head_that_trains_costs_one_product() -> None:
    hidden, weight = torch.ones(16, 8), torch.ones(32, 8, requires_grad=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, None, torch.zeros(16, dtype=torch.int64), torch.float32)
    assert counter.get_total_flops() == 2 * 16 * 8 * 32
