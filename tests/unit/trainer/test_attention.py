"""Packed computation against each example computed alone: the reference is transformers' own attention, which knows nothing of packing."""

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from finetune_trainer.attention import NAME, Spans, by_kernel, choose_layout, forward_arguments
from finetune_trainer.data.examples import Examples, join
from finetune_trainer.data.tensors import collate

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2}

ISOLATED = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "mistral, window of 3": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=3)),
    "mixtral: experts": lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
}
PADDED = {
    "mamba: a state along the row": lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)),
    "bloom: attention of its own": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)),
    "gemma2: soft caps": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8)),
    "gpt-oss: sinks": lambda: GptOssForCausalLM(GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1)),
    "lfm2: convolutions along the row": lambda: Lfm2ForCausalLM(
        Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], initializer_range=0.05)
    ),
}


def model_of(make: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # larger than transformers makes them, so that a leak between examples shows
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def documents(*lengths: int) -> Examples:
    generator = np.random.default_rng(1)
    return join([(generator.integers(0, 64, length).astype(np.int32), np.ones(length, np.bool_)) for length in lengths])


def computed_alone(model: PreTrainedModel, examples: Examples) -> torch.Tensor:
    """The logits of each example from a call of its own with transformers' eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    rows = [model(torch.tensor([examples.example(index)[0].tolist()]), use_cache=False).logits[0] for index in range(len(examples))]
    model.set_attn_implementation(before)
    return torch.cat(rows)


@pytest.mark.parametrize("make", ISOLATED.values(), ids=ISOLATED.keys())
@torch.no_grad()
def test_packed_examples_come_out_as_they_do_alone(make: object) -> None:
    model = model_of(make)
    assert choose_layout(model) == "flat"
    examples = documents(7, 1, 12, 2)
    packed = model(**forward_arguments(collate(examples, [(0, 1, 2, 3)], "flat"))).logits[0]
    torch.testing.assert_close(packed, computed_alone(model, examples), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", ISOLATED.values(), ids=ISOLATED.keys())
def test_gradients_agree_too(make: object) -> None:
    model = model_of(make)
    examples = documents(5, 9)
    choose_layout(model)
    computed_alone(model, examples).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(**forward_arguments(collate(examples, [(0, 1)], "flat"))).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()), msg=name)


@pytest.mark.parametrize("make", PADDED.values(), ids=PADDED.keys())
@torch.no_grad()
def test_a_model_that_cannot_keep_examples_apart_gets_padded_rows(make: object) -> None:
    """And computes them right: no real token sees the padding."""
    model = model_of(make)
    before = model.config._attn_implementation
    assert choose_layout(model) == "padded"
    assert model.config._attn_implementation == before
    examples = documents(7, 3)
    padded = model(**forward_arguments(collate(examples, [(0, 1)], "padded"))).logits
    torch.testing.assert_close(torch.cat([padded[0], padded[1, :3]]), computed_alone(model, examples), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*ISOLATED, *PADDED])
def test_half_precision_hides_no_leak(name: str) -> None:
    """With small weights, as transformers makes them: what leaks is then smaller than what rounding may do to the largest value."""
    torch.manual_seed(0)
    model = (ISOLATED | PADDED)[name]().eval().to(torch.bfloat16)
    assert choose_layout(model) == ("flat" if name in ISOLATED else "padded")


def test_a_call_without_boundaries_is_refused_rather_than_computed_wrong() -> None:
    model = model_of(ISOLATED["llama"])
    choose_layout(model)
    with pytest.raises(Exception, match="does not hand the row"):
        model(torch.tensor([[1, 2, 3]]), use_cache=False)


def test_trying_leaves_the_mode_of_the_model_as_it_was() -> None:
    model = model_of(ISOLATED["llama"]).train()
    choose_layout(model)
    assert model.training
    assert model.config._attn_implementation == NAME


def test_activation_checkpointing_keeps_the_boundaries() -> None:
    model = model_of(ISOLATED["llama"]).train()
    choose_layout(model)
    arguments = forward_arguments(collate(documents(5, 9), [(0, 1)], "flat"))
    model(**arguments).logits.square().sum().backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**arguments).logits.square().sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected)


def test_the_kernels_call_has_the_right_form() -> None:
    """Its shapes, on the `meta` device: 10 tokens in two documents, 4 query heads over 2 key heads."""
    query, key = (torch.empty(1, heads, 10, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    for window in (None, 3):
        assert by_kernel(query, key, key, 0.25, window, Spans(6, bounds)).shape == (1, 10, 4, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a CUDA device")
@pytest.mark.parametrize("make", [ISOLATED["llama"], ISOLATED["mistral, window of 3"]], ids=["llama", "mistral"])
@torch.no_grad()
def test_the_kernel_agrees_with_examples_alone(make: object) -> None:
    model = model_of(make).to("cuda", torch.bfloat16)
    examples = documents(7, 1, 12, 2)
    assert choose_layout(model) == "flat"
    packed = model(**forward_arguments(collate(examples, [(0, 1, 2, 3)], "flat").to("cuda"))).logits[0]
    expected = computed_alone(model.float().cpu(), examples)
    torch.testing.assert_close(packed.float().cpu(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
