"""Freezing: which parameters train, in which format, and that what is published is a whole model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from tuned import INPUT, learn, method, on_meta, shake, tiny, trained_names

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel, count_parameters, trained_state


def layer(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}"


@pytest.mark.parametrize(
    ("spec", "prefixes"),
    [
        ({"lastLayers": 1}, ("model.layers.1.",)),
        ({"lastLayers": 2}, ("model.layers.0.", "model.layers.1.")),
        ({"lastLayers": 1, "head": True}, ("model.layers.1.", "lm_head.")),
        ({"lastLayers": 1, "embeddings": True}, ("model.layers.1.", "model.embed_tokens.")),
        ({"modules": ["layers.0"]}, ("model.layers.0.",)),
        ({"modules": ["mlp.down_proj"]}, ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")),
        ({"modules": ["model.norm"], "head": True}, ("model.norm.", "lm_head.")),
        ({"modules": ["layers.1.*.v_proj"]}, ("model.layers.1.self_attn.v_proj.",)),
    ],
)
def test_what_is_named_trains_and_nothing_else(spec: dict[str, object], prefixes: tuple[str, ...]) -> None:
    model = method(freeze=spec).apply(tiny(), seed=1)
    expected = [name for name, _ in tiny().named_parameters() if name.startswith(prefixes)]
    assert trained_names(model) == expected
    assert expected
    assert trained_names(method(freeze=spec).apply(on_meta(), seed=1)) == expected, "the head sees the same"


def test_a_tied_head_is_the_embeddings() -> None:
    model = method(freeze={"lastLayers": 1, "head": True}).apply(tiny(tie_word_embeddings=True), seed=1)
    assert "model.embed_tokens.weight" in trained_names(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_trains_is_float32_beside_a_frozen_bfloat16_part() -> None:
    """An update of a thousandth would be lost in bfloat16, which has eight bits of precision."""
    model = method(freeze={"lastLayers": 1}).apply(tiny().bfloat16(), seed=1)
    formats = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {formats[name] for name in trained_names(model)} == {torch.float32}
    assert formats[layer(0, "mlp.up_proj.weight")] == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=INPUT, labels=INPUT).loss
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in trained_names(model))


def test_it_learns_and_what_is_frozen_stays() -> None:
    model = method(freeze={"lastLayers": 1}).apply(tiny(), seed=1)
    first, last = learn(model)
    assert last < first - 0.3
    before = tiny().state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trained_names(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_model_is_published_in_the_bases_format(tmp_path: Path, dtype: str) -> None:
    freeze = method(freeze={"lastLayers": 1})
    base = tiny().to(getattr(torch, dtype))
    model = freeze.apply(base, seed=1)
    shake(model)
    freeze.export(model, tmp_path, BaseModel("owner/name", None, dtype), "model")
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}
    assert torch.equal(saved[layer(0, "mlp.up_proj.weight")], base.state_dict()[layer(0, "mlp.up_proj.weight")])
    if dtype == "float32":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(INPUT).logits, model(INPUT).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "reason", "message"),
    [
        ({"lastLayers": 3}, Reason.INVALID_SPEC, r"method.freeze.lastLayers is 3, but the model has 2 layers"),
        (
            {"modules": ["layers.7"]},
            Reason.INVALID_SPEC,
            r"method.freeze.modules: no module is called layers.7; there are act_fn, down_proj, embed_tokens",
        ),
        ({"modules": ["act_fn"]}, Reason.INVALID_SPEC, "method.freeze.modules: act_fn hold no weights"),
    ],
)
def test_what_does_not_fit_is_told_with_what_there_is(spec: dict[str, object], reason: Reason, message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        method(freeze=spec).apply(on_meta(), seed=1)
    assert caught.value.reason == reason


def test_the_share_that_trains_is_counted() -> None:
    """A layer: q and o 32x32, k and v 16x32, gate, up and down 48x32, two norms of 32. Beside two of them: embeddings, head, a norm."""
    per_layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    counts = count_parameters(method(freeze={"lastLayers": 1}).apply(tiny(), seed=1))
    assert (counts.trained_parameters, counts.parameters) == (per_layer, 2 * per_layer + 2 * 259 * 32 + 32)


def test_a_checkpoint_holds_what_trains() -> None:
    freeze = method(freeze={"modules": ["norm"]})
    assert set(trained_state(freeze.apply(tiny(), seed=1))) == {"model.norm.weight"}
