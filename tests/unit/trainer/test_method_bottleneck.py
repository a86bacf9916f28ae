"""Bottleneck adapters: their formula, their places in several architectures, and that PEFT handles them as its own."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from tuned import BASE, INPUT, learn, method, on_meta, shake, tiny, trained_names

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.methods.bottleneck.bottleneck_adapter import BottleneckConfig, BottleneckLayer, blocks_of
from finetune_trainer.methods.method import count_parameters

HOULSBY, PFEIFFER = {"placement": "houlsby", "reductionFactor": 4}, {"placement": "pfeiffer", "reductionFactor": 4}
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def config(**changes: object) -> BottleneckConfig:
    return BottleneckConfig(task_type="CAUSAL_LM", placement="houlsby", reduction_factor=4, **changes)


def adapters(model: torch.nn.Module) -> dict[str, BottleneckLayer]:
    return {name.split(".layers.")[-1]: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}


@pytest.mark.parametrize(
    ("spec", "places"),
    [(HOULSBY, {"0.self_attn", "0.mlp", "1.self_attn", "1.mlp"}), (PFEIFFER, {"0.mlp", "1.mlp"})],
    ids=["houlsby", "pfeiffer"],
)
def test_places_and_parameters(spec: dict[str, object], places: set[str]) -> None:
    """Each adapter: 32 x 8 and 8 x 32 with their biases of 8 and 32."""
    model = method(adapter=spec).apply(tiny(), seed=1)
    assert set(adapters(model)) == places
    counts = count_parameters(model)
    assert counts.trained_parameters == len(places) * (32 * 8 + 8 + 8 * 32 + 32)
    assert counts.parameters - counts.trained_parameters == tiny().num_parameters()
    assert all("bottleneck_" in name for name in trained_names(model))
    assert count_parameters(method(adapter=spec).apply(on_meta(), seed=1)) == counts, "the head counts the same"


@pytest.mark.parametrize("spec", [HOULSBY, PFEIFFER], ids=["houlsby", "pfeiffer"])
def test_it_begins_as_the_base_model_and_learns(spec: dict[str, object]) -> None:
    model = method(adapter=spec).apply(tiny(), seed=1)
    assert torch.equal(model(INPUT).logits, tiny()(INPUT).logits)
    first, last = learn(model, rate=5e-2)
    assert last < first - 0.1  # little can be learnt through a frozen head of random weights


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", lambda z: z.clamp(min=0)),
        ("tanh", lambda z: (z.exp() - (-z).exp()) / (z.exp() + (-z).exp())),
        ("silu", lambda z: z / (1 + (-z).exp())),
        ("gelu", lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5))),
    ],
)
def test_the_formula(name: str, function: object) -> None:
    """h + W_up f(W_down h + b_down) + b_up, of the output h of the block; the rest of the layer sees only that."""
    model = method(adapter=PFEIFFER | {"nonLinearity": name}).apply(tiny(), seed=1)
    shake(model, 0.5)
    layer = adapters(model)["0.mlp"]
    states = torch.randn(1, 3, 32)
    h = layer.base_layer(states)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    z = h @ down.weight.T + down.bias
    torch.testing.assert_close(layer(states), h + function(z) @ up.weight.T + up.bias, rtol=1e-5, atol=1e-5)  # type: ignore[operator]


def test_dropout_is_for_training_alone() -> None:
    model = method(adapter=PFEIFFER | {"dropout": 0.5}).apply(tiny(), seed=1)
    shake(model)
    model.train()
    assert not torch.equal(model(INPUT).logits, model(INPUT).logits)
    model.eval()
    assert torch.equal(model(INPUT).logits, model(INPUT).logits)


def test_attention_gives_more_than_hidden_states() -> None:
    """What else it gives (maps) passes unchanged, and where the block is asked for an attribute it answers."""
    model = method(adapter=HOULSBY).apply(tiny(attn_implementation="eager"), seed=1)
    shake(model)
    outputs = model(INPUT, output_attentions=True)
    assert [tuple(maps.shape) for maps in outputs.attentions] == [(1, 4, 6, 6)] * 2
    layer = adapters(model)["1.self_attn"]
    assert layer.layer_idx == 1
    with pytest.raises(AttributeError):
        _ = layer.nothing_of_this_name


MODELS: dict[str, tuple[PreTrainedModel, dict[str, object], str, str]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL), "self_attn", "mlp"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=8), "self_attn", "mlp"),
    "mistral": (MistralForCausalLM, MistralConfig(**SMALL), "self_attn", "mlp"),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SMALL, num_local_experts=2), "self_attn", "mlp"),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8), "self_attn", "mlp"),
    "phi3": (Phi3ForCausalLM, Phi3Config(**SMALL), "self_attn", "mlp"),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16), "attn", "mlp"),
    "neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(**{key: value for key, value in SMALL.items() if key != "num_key_value_heads"}),
        "attention",
        "mlp",
    ),
    "falcon": (
        FalconForCausalLM,
        FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        "self_attention",
        "mlp",
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=32,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=32,
        ),
        "self_attn",
        "fc2",
    ),
}  # type: ignore[assignment]


@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_blocks_are_found_in_many_architectures(architecture: str, tmp_path: Path) -> None:
    """Two blocks of each of two layers; begins unchanged; comes back from its folder."""
    kind, settings, attention, feed_forward = MODELS[architecture]
    torch.manual_seed(0)
    base = kind(settings).eval()  # type: ignore[operator]
    expected = base(INPUT).logits
    untouched = copy.deepcopy(base)
    names = blocks_of(base, "houlsby")
    assert sorted(name.rpartition(".")[2] for name in names) == sorted([attention, feed_forward] * 2)
    tuning = method(adapter=HOULSBY)
    model = tuning.apply(base, seed=1)
    torch.testing.assert_close(model(INPUT).logits, expected)
    shake(model)
    assert (model(INPUT).logits - expected).abs().max() > 1e-3
    tuning.export(model, tmp_path, BASE, "adapter")
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    torch.testing.assert_close(loaded(INPUT).logits, model(INPUT).logits, rtol=0, atol=1e-5)


def test_a_model_without_such_blocks_is_refused() -> None:
    with torch.device("meta"):
        mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(JobError, match=r"no feed-forward blocks are found in MambaForCausalLM: its layers hold mixer, norm") as caught:
        method(adapter=PFEIFFER).apply(mamba, seed=1)
    assert caught.value.reason == Reason.INVALID_SPEC


def test_a_new_tasks_adapter_leaves_the_others_bytes_and_outputs_unchanged(tmp_path: Path) -> None:
    model = get_peft_model(tiny(), config(), adapter_name="first")
    shake(model)
    first_output = model(INPUT).logits
    model.save_pretrained(tmp_path / "before", selected_adapters=["first"])

    model.add_adapter("second", config(non_linearity="tanh"))
    assert torch.equal(model(INPUT).logits, first_output), "a second adapter is not in use until it is asked for"
    model.set_adapter("second")
    assert all("second" in name for name in trained_names(model))
    learn(model)
    second_output = model(INPUT).logits
    assert not torch.equal(second_output, first_output)

    model.set_adapter("first")
    assert torch.equal(model(INPUT).logits, first_output)
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / "first" / name).read_bytes() == (tmp_path / "after" / "first" / name).read_bytes()

    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "after" / "first", adapter_name="first")
    loaded.load_adapter(str(tmp_path / "after" / "second"), adapter_name="second")
    torch.testing.assert_close(loaded(INPUT).logits, first_output, rtol=0, atol=1e-5)
    loaded.set_adapter("second")
    torch.testing.assert_close(loaded(INPUT).logits, second_output, rtol=0, atol=1e-5)
    with loaded.disable_adapter():
        assert torch.equal(loaded(INPUT).logits, tiny()(INPUT).logits)
    loaded.delete_adapter("second")
    loaded.set_adapter("first")
    torch.testing.assert_close(loaded(INPUT).logits, first_output, rtol=0, atol=1e-5)
    assert torch.equal(loaded.unload()(INPUT).logits, tiny()(INPUT).logits)


def test_two_active_adapters_stand_one_after_the_other() -> None:
    model = get_peft_model(tiny(), config(), adapter_name="first")
    model.add_adapter("second", config())
    model.base_model.set_adapter(["first", "second"])
    shake(model)
    layer = adapters(model)["0.mlp"]
    states = torch.randn(1, 3, 32)
    h = layer.base_layer(states)
    for name in ("first", "second"):
        down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
        h = h + torch.relu(h @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(layer(states), h, rtol=1e-5, atol=1e-5)


def test_it_cannot_be_merged() -> None:
    model = get_peft_model(tiny(), config())
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged: it is not linear"):
            merge()


def test_it_loads_without_making_weights_first(tmp_path: Path) -> None:
    adapter = method(adapter=HOULSBY)
    model = adapter.apply(tiny(), seed=1)
    shake(model)
    adapter.export(model, tmp_path, BASE, "adapter")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(loaded(INPUT).logits, model(INPUT).logits, rtol=0, atol=1e-5)


def test_its_folder_is_one_of_pefts(tmp_path: Path) -> None:
    adapter = method(adapter=HOULSBY)
    adapter.export(adapter.apply(tiny(), seed=1), tmp_path, BASE, "adapter")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "bottleneck_adapter.py",
    ]
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["placement"], saved["reduction_factor"]) == ("BOTTLENECK", "houlsby", 4)
    assert sorted(saved["target_modules"]) == ["mlp", "self_attn"]
    assert "base_model.model.model.layers.0.mlp.bottleneck_up.weight" in load_file(tmp_path / "adapter_model.safetensors")


def test_it_stays_float32_beside_a_bfloat16_base() -> None:
    model = method(adapter=HOULSBY).apply(tiny().bfloat16(), seed=1)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(INPUT).logits.dtype == torch.bfloat16
    assert model(INPUT).logits.dtype == torch.bfloat16, "served without autocast it keeps the base's format"


@pytest.mark.parametrize("wrong", [{"placement": "everywhere"}, {"non_linearity": "step"}, {"reduction_factor": 0.5}])
def test_a_configuration_that_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BottleneckConfig(**wrong)
