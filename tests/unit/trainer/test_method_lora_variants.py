"""DoRA, rsLoRA and PiSSA: their formulas on one layer, and that each is published as a LoRA for the base model as it came."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from tuned import BASE, INPUT, learn, method, on_meta, shake, tiny, trained_names

from finetune_api.reasons import Reason
from finetune_trainer.attention import choose_layout
from finetune_trainer.data.examples import join
from finetune_trainer.data.tensors import MicroBatch, collate
from finetune_trainer.errors import JobError
from finetune_trainer.methods import check_mergeable
from finetune_trainer.methods.method import BaseModel, trained_state
from finetune_trainer.model import CausalModel, head_scale
from finetune_trainer.objectives import Sft

VARIANTS = ("none", "dora", "rslora", "pissa")
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def lora(variant: str, **changes: object) -> dict[str, object]:
    return {"lora": {"rank": 4, "alpha": 8, "variant": variant, "targetModules": ["q_proj", "down_proj"]} | changes}


def linear(model: torch.nn.Module) -> torch.nn.Module:
    return model.get_submodule(Q)


def matrices(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_begins_as_the_base_model(variant: str) -> None:
    model = method(**lora(variant)).apply(tiny(), seed=1)
    torch.testing.assert_close(model(INPUT).logits, tiny()(INPUT).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns(variant: str) -> None:
    model = method(**lora(variant)).apply(tiny(), seed=1)
    first, last = learn(model, rate=5e-2)
    assert last < first - 0.3
    assert all("lora_" in name for name in trained_names(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_head_sees_the_same_parameters_without_weights(variant: str) -> None:
    shapes = [
        {name: tensor.shape for name, tensor in trained_state(method(**lora(variant)).apply(model, seed=1)).items()}
        for model in (tiny(), on_meta())
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("variant", "scale"), [("none", 8 / 4), ("rslora", 8 / math.sqrt(4))])
def test_the_scale_of_an_update(variant: str, scale: float) -> None:
    """W x + alpha / r B A x; rsLoRA (Kalajdzievski 2023): alpha / sqrt(r)."""
    model = method(**lora(variant)).apply(tiny(), seed=1)
    shake(model)
    layer, states = linear(model), torch.randn(3, 32)
    a, b = matrices(layer)
    expected = states @ layer.base_layer.weight.T + scale * (states @ a.T) @ b.T
    torch.testing.assert_close(layer(states), expected, rtol=1e-5, atol=1e-5)


def test_doras_magnitude_and_direction() -> None:
    """m (W + s B A) / ||W + s B A||, each row of W by its own norm (Liu et al. 2024, equation 5)."""
    model = method(**lora("dora")).apply(tiny(), seed=1)
    shake(model)
    layer, states = linear(model), torch.randn(3, 32)
    a, b = matrices(layer)
    direction = layer.base_layer.weight + 2 * b @ a
    magnitude = layer.lora_magnitude_vector["default"].weight.detach()
    weight = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(states), states @ weight.T, rtol=1e-5, atol=1e-5)


def test_pissa_begins_with_the_principal_components() -> None:
    """s B A is the truncated singular value decomposition of W, and the frozen rest is W less that (Meng et al. 2024, equations 2 to 4)."""
    spec = lora("pissa", rank=32, alpha=32, targetModules=["q_proj"])
    whole = tiny().get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    layer = linear(method(**spec).apply(tiny(), seed=1))
    a, b = matrices(layer)
    torch.testing.assert_close(b @ a, whole, rtol=0, atol=1e-5)
    assert layer.base_layer.weight.abs().max() < 1e-5

    base = tiny()
    u, _, v = torch.linalg.svd(whole)
    decaying = u * 0.5 ** torch.arange(32) @ v
    with torch.no_grad():
        base.get_submodule("model.layers.0.self_attn.q_proj").weight.copy_(decaying)
    layer = linear(method(**lora("pissa")).apply(base, seed=1))
    a, b = matrices(layer)
    best = u[:, :4] * 0.5 ** torch.arange(4) @ v[:4]
    torch.testing.assert_close(2 * b @ a, best, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight.detach() + 2 * b @ a, decaying, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_published_adapter_is_for_the_base_model_as_it_came(tmp_path: Path, variant: str) -> None:
    tuning = method(**lora(variant))
    model = tuning.apply(tiny(), seed=1)
    shake(model)
    expected = model.eval()(INPUT).logits
    tuning.export(model, tmp_path, BASE, "adapter")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    torch.testing.assert_close(loaded(INPUT).logits, expected, rtol=0, atol=1e-5)
    with loaded.disable_adapter():
        assert torch.equal(loaded(INPUT).logits, tiny()(INPUT).logits)
    torch.testing.assert_close(model(INPUT).logits, expected, rtol=0, atol=0)  # publishing leaves the model as it is


def test_a_pissa_is_published_with_twice_its_rank(tmp_path: Path) -> None:
    tuning = method(**lora("pissa"))
    model = tuning.apply(tiny(), seed=1)
    tuning.export(model, tmp_path, BASE, "adapter")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"], config["revision"]) == (8, 16, True, "c0ffee")
    assert model.peft_config["default"].r == 4
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved[f"{Q}.lora_A.weight"].shape == (8, 32)


def test_a_pissa_that_was_interrupted_goes_on_exactly() -> None:
    """The rest of the base weights is made again from the same weights and seed; the update comes from the checkpoint."""
    models = [method(**lora("pissa")).apply(tiny(), seed=3) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True))
    learn(models[0], steps=3)
    models[1].load_state_dict({name: tensor.clone() for name, tensor in trained_state(models[0]).items()}, strict=False)
    assert torch.equal(models[0](INPUT).logits, models[1](INPUT).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_untuned_model_is_at_hand(variant: str) -> None:
    base = tiny()
    expected = tiny()(INPUT).logits
    module = method(**lora(variant)).apply(base, seed=1)
    shake(module)
    tuned = module(INPUT).logits
    model = CausalModel(module, base, "padded", True, torch.float32, torch.device("cpu"))
    ids = INPUT
    batch = MicroBatch(ids, torch.empty(0, dtype=torch.int64), torch.arange(6)[None], torch.empty(0, dtype=torch.int64), (6,), "padded")
    with torch.no_grad(), model.untuned() as untuned:
        logits = untuned.run(batch, logits=True).logits
    assert logits is not None
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(module(INPUT).logits, tuned)


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (lora("pissa", rank=33), {}, "method.lora.rank is 33, but model.layers.0.mlp.down_proj has only 32 principal components"),
        (lora("pissa", targetModules=["lm_head"]), {"tie_word_embeddings": True}, "pissa would change lm_head, which shares its weights"),
    ],
)
def test_a_pissa_that_cannot_be_is_refused_on_the_head(spec: dict[str, object], changes: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        method(**spec).apply(on_meta(**changes), seed=1)
    assert caught.value.reason == Reason.INVALID_SPEC


def test_tied_weights_are_not_merged() -> None:
    def applied(*targets: str) -> torch.nn.Module:
        return method(lora={"targetModules": list(targets)}).apply(on_meta(tie_word_embeddings=True), seed=1)

    with pytest.raises(JobError, match="merged cannot be made: lm_head shares its weights") as caught:
        check_mergeable(applied("lm_head", "q_proj"))
    assert caught.value.reason == Reason.INVALID_SPEC
    check_mergeable(applied("all-linear"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_a_merged_model_keeps_the_number_format_of_its_base(tmp_path: Path, variant: str, dtype: str, tolerance: float) -> None:
    tuning = method(**lora(variant))
    model = tuning.apply(tiny(), seed=1)
    shake(model)
    expected = model.eval()(INPUT).logits
    tuning.export(model, tmp_path, BaseModel("owner/name", None, dtype), "merged")
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded(INPUT).logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [*VARIANTS, "ia3"])
def test_the_output_layer_can_be_tuned_too(name: str) -> None:
    """The loss and its gradients are those of PEFT's own model, which computes the logits with what was put beside the output layer."""
    targets = {"targetModules": ["q_proj", "lm_head"]}
    spec = {"ia3": targets} if name == "ia3" else {"lora": {"rank": 2, "variant": name, **targets}}
    model = tiny()
    scale = head_scale(model, choose_layout(model))
    module = method(**spec).apply(model, seed=1)
    shake(module)
    wrapped = CausalModel(module, model, "flat", scale, torch.float32, torch.device("cpu"))
    tokens = np.arange(5, 14, dtype=np.int32)
    loss = Sft().loss(wrapped, collate(join([(tokens, np.ones(9, np.bool_))]), ((0,),), "flat")).total
    gradients = torch.autograd.grad(loss, wrapped.trained_parameters())
    model.set_attn_implementation("sdpa")
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    expected = module(input_ids=ids, labels=ids).loss * 8
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for own, reference in zip(gradients, torch.autograd.grad(expected, wrapped.trained_parameters()), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)
    assert any(gradient.any() for name, gradient in zip(trained_names(module), gradients, strict=True) if "lm_head" in name)
