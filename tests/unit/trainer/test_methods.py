import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_llama_config
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Method as MethodSpec
from finetune_trainer.errors import JobError
from finetune_trainer.methods import Method, method_for
from finetune_trainer.methods.method import BaseModel, trained_state
from finetune_trainer.methods.modules import matching_modules, shortened


def tiny(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(**changes))


def method(**spec: object) -> Method:
    return method_for(MethodSpec.model_validate_json(json.dumps(spec)))


def shake(model: torch.nn.Module) -> None:
    """Trained parameters as if they had been trained: LoRA's updates start as zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


INPUT = torch.tensor([[5, 6, 7, 8]])


def test_lora_trains_its_updates_alone() -> None:
    """Two layers of seven linear modules with two matrices each: q 32x32, k and v 16x32, o 32x32, gate and up 48x32, down 32x48."""
    model = method(lora={"rank": 4}).apply(tiny(), seed=1)
    state = trained_state(model)
    assert len(state) == 2 * 7 * 2
    per_layer = 4 * ((32 + 32) * 2 + (16 + 32) * 2 + (48 + 32) * 3)
    assert sum(tensor.numel() for tensor in state.values()) == 2 * per_layer
    assert all("lora_" in name for name in state)


def test_lora_starts_as_the_base_model() -> None:
    expected = tiny()(INPUT).logits
    torch.testing.assert_close(method(lora={}).apply(tiny(), seed=1)(INPUT).logits, expected)


def test_lora_follows_from_its_seed_and_leaves_the_global_one() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    models = [method(lora={}).apply(tiny_like, seed=seed) for tiny_like, seed in zip(_same_models(3), (1, 1, 2), strict=True)]
    assert torch.rand(1) == expected
    first, same, other = (next(t for name, t in trained_state(model).items() if "lora_A" in name) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def _same_models(count: int) -> list[PreTrainedModel]:
    with torch.random.fork_rng():
        return [tiny() for _ in range(count)]


def test_lora_stays_float32_beside_a_bfloat16_base() -> None:
    model = method(lora={}).apply(tiny().bfloat16(), seed=1)
    assert {tensor.dtype for tensor in trained_state(model).values()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(INPUT).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("all-linear",), ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (("q_proj", "v_proj"), ["q_proj", "v_proj"]),
        (("self_attn.q_proj",), ["q_proj"]),
        (("layers.0.*.q_proj",), ["model.layers.0.self_attn.q_proj"]),
        (("q_proj", "lm_head"), ["lm_head", "q_proj"]),
    ],
)
def test_patterns_mean_modules(patterns: tuple[str, ...], expected: list[str]) -> None:
    model = tiny()
    assert shortened(model, matching_modules(model, patterns, "field")) == expected


def test_gpt2s_linear_layers_are_found_under_their_own_class() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    assert shortened(model, matching_modules(model, ("all-linear",), "field")) == ["c_attn", "c_fc", "c_proj"]
    method(lora={}).apply(model, seed=0)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["query"], "no module is called query; there are down_proj, gate_proj, k_proj"),
        (["q_proj", "nothing.*"], r"no module is called nothing\.\*"),
        (["self_attn"], "method.lora.targetModules: "),
    ],
)
def test_modules_that_cannot_get_an_update_are_named(patterns: list[str], message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        method(lora={"targetModules": patterns}).apply(tiny(), seed=1)
    assert caught.value.reason == Reason.INVALID_SPEC


def test_a_published_adapter_is_what_was_trained(tmp_path: Path, model_folder: Path) -> None:
    """Loaded by PEFT onto the base model, as anyone would."""
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    lora = method(lora={"rank": 4, "alpha": 8})
    model = lora.apply(base, seed=1)
    shake(model)
    expected = model(INPUT).logits
    lora.export(model, tmp_path, BaseModel("owner/name", "c0ffee"), "adapter")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["r"], config["lora_alpha"]) == ("owner/name", "c0ffee", 4, 8)
    assert sorted(config["target_modules"]) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 28
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path)
    torch.testing.assert_close(loaded(INPUT).logits, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_published_model_is_what_was_trained(tmp_path: Path, tied: bool) -> None:
    full = method(full={})
    model = full.apply(tiny(tie_word_embeddings=tied), seed=1)
    shake(model)
    full.export(model, tmp_path, BaseModel("owner/name", None, "float32"), "model")
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(INPUT).logits, model(INPUT).logits)


def test_a_published_model_keeps_the_number_format_of_its_base(tmp_path: Path) -> None:
    full = method(full={})
    model = full.apply(tiny(), seed=1)
    full.export(model, tmp_path, BaseModel("owner/name", None, "bfloat16"), "model")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("spec", [{"lora": {}}, {"full": {}}], ids=["lora", "full"])
def test_trained_parameters_come_back(spec: dict[str, object]) -> None:
    model, other = (method(**spec).apply(tiny(), seed=seed) for seed in (1, 2))
    shake(model)
    other.load_state_dict({name: tensor.clone() for name, tensor in trained_state(model).items()}, strict=False)
    torch.testing.assert_close(other(INPUT).logits, model(INPUT).logits, rtol=0, atol=0)
