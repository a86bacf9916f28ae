"""(IA)^3: where its vectors stand, what they do, and that it can be published beside the model or worked into it."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, OlmoConfig, OlmoForCausalLM
from tuned import BASE, INPUT, learn, method, on_meta, shake, tiny, trained_names

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import count_parameters, trained_state

LAYER = "base_model.model.model.layers.0"


def gpt2() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16)).eval()


def test_keys_values_and_feed_forward_are_rescaled() -> None:
    """Liu et al. 2022: in each layer a vector for the keys, one for the values (16 each here), one for the inner activations (48)."""
    model = method(ia3={}).apply(tiny(), seed=1)
    assert {name.split(".")[-3] for name in trained_names(model)} == {"k_proj", "v_proj", "down_proj"}
    assert count_parameters(model).trained_parameters == 2 * (16 + 16 + 48)


def test_it_begins_as_the_base_model_and_learns() -> None:
    model = method(ia3={}).apply(tiny(), seed=1)
    assert torch.equal(model(INPUT).logits, tiny()(INPUT).logits)
    first, last = learn(model, steps=40, rate=0.2)
    assert last < first - 0.1  # little can be learnt through a frozen head of random weights


def test_the_formulas() -> None:
    """Outputs of keys: l * (W x). Inputs of the feed-forward layer: W (l * x)."""
    model = method(ia3={}).apply(tiny(), seed=1)
    shake(model)
    keys, inner = model.get_submodule(f"{LAYER}.self_attn.k_proj"), model.get_submodule(f"{LAYER}.mlp.down_proj")
    states, wide = torch.randn(3, 32), torch.randn(3, 48)
    scale = keys.ia3_l["default"].flatten()
    torch.testing.assert_close(keys(states), scale * (states @ keys.base_layer.weight.T))
    scale = inner.ia3_l["default"].flatten()
    torch.testing.assert_close(inner(wide), (scale * wide) @ inner.base_layer.weight.T)


def test_named_modules_are_rescaled() -> None:
    spec = {"targetModules": ["q_proj", "layers.1.mlp.up_proj"], "feedForwardModules": ["layers.1.mlp.up_proj"]}
    model = method(ia3=spec).apply(tiny(), seed=1)
    shapes = {name.removeprefix("base_model.model.model.layers."): tuple(tensor.shape) for name, tensor in trained_state(model).items()}
    assert shapes == {
        "0.self_attn.q_proj.ia3_l.default": (32, 1),
        "1.self_attn.q_proj.ia3_l.default": (32, 1),
        "1.mlp.up_proj.ia3_l.default": (1, 32),
    }


@pytest.mark.parametrize("make", [tiny, gpt2])
def test_the_published_adapter_loads(tmp_path: Path, make: type) -> None:
    ia3 = method(ia3={})
    model = ia3.apply(make(), seed=1)
    shake(model)
    ia3.export(model, tmp_path, BASE, "adapter")
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(loaded(INPUT).logits, model(INPUT).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"targetModules": ["query"]}, "method.ia3.targetModules: no module is called query; there are down_proj"),
        ({"targetModules": ["mlp"]}, "method.ia3.targetModules: Target module LlamaMLP"),
    ],
)
def test_modules_that_cannot_be_rescaled_are_named(spec: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        method(ia3=spec).apply(on_meta(), seed=1)
    assert caught.value.reason == Reason.INVALID_SPEC


def test_an_architecture_that_peft_does_not_know_needs_names() -> None:
    with torch.device("meta"):
        olmo = OlmoForCausalLM(OlmoConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(JobError, match=r"method.ia3.targetModules: PEFT does not know which modules of olmo to rescale; name them"):
        method(ia3={}).apply(olmo, seed=1)
    method(ia3={"targetModules": ["k_proj", "v_proj"]}).apply(olmo, seed=1)
