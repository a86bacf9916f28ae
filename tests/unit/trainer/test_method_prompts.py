"""Soft prompts: what trains, what they begin with, and that a published one gives what the training saw."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast
from tuned import BASE, INPUT, learn, method, on_meta, shake, tiny, trained_names

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import count_parameters, trained_state
from finetune_trainer.methods.prompts import PREFIX_SCALE

HEAD_DIM, KEY_HEADS, LAYERS = 8, 2, 2
SPECS: dict[str, dict[str, object]] = {
    "prompt": {"promptTuning": {"numVirtualTokens": 5}},
    "prefix": {"prefixTuning": {"numVirtualTokens": 5}},
    "projected prefix": {"prefixTuning": {"numVirtualTokens": 5, "projectionSize": 12}},
    "mlp": {"pTuning": {"numVirtualTokens": 5, "encoderHiddenSize": 12}},
    "lstm": {"pTuning": {"numVirtualTokens": 5, "encoder": "lstm", "encoderHiddenSize": 12, "encoderDropout": 0.2}},
}
KV = LAYERS * 2 * KEY_HEADS * HEAD_DIM
COUNTS = {
    "prompt": 5 * 32,
    "prefix": 5 * KV,
    # PEFT's encoder: embeddings of the keys' width, a layer of 12, and one to all keys and values.
    "projected prefix": 5 * 16 + (16 * 12 + 12) + (12 * KV + KV),
    "mlp": 5 * 32 + (32 * 12 + 12) + (12 * 12 + 12) + (12 * 32 + 32),
    # Two layers in two directions with four gates and two biases each, then 24 -> 24 -> 32.
    "lstm": 5 * 32 + 2 * 4 * (12 * 32 + 12 * 12 + 24) + 2 * 4 * (12 * 24 + 12 * 12 + 24) + (24 * 24 + 24) + (24 * 32 + 32),
}


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_the_prompt_alone_trains(kind: str) -> None:
    model = method(**SPECS[kind]).apply(tiny(), seed=1)
    assert all(name.startswith("prompt_encoder.") for name in trained_names(model))
    counts = count_parameters(model)
    assert counts.trained_parameters == COUNTS[kind]
    assert {tensor.dtype for tensor in trained_state(model).values()} == {torch.float32}
    assert count_parameters(method(**SPECS[kind]).apply(on_meta(), seed=1)) == counts, "the head counts the same"
    assert method(**SPECS[kind]).virtual_tokens == 5


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_it_learns(kind: str) -> None:
    model = method(**SPECS[kind]).apply(tiny(), seed=1)
    before = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    first, last = learn(model, steps=40, rate=5e-2)
    assert last < first - 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.get_base_model().state_dict().items())


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_it_follows_from_its_seed(kind: str) -> None:
    one, same, other = (trained_state(method(**SPECS[kind]).apply(tiny(), seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_the_published_prompt_loads(kind: str, tmp_path: Path) -> None:
    tuning = method(**SPECS[kind])
    model = tuning.apply(tiny(), seed=1)
    shake(model)
    expected = model.eval()(INPUT).logits
    tuning.export(model.train(), tmp_path, BASE, "adapter")
    assert model.training
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}, "no encoder is needed any more"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    torch.testing.assert_close(loaded(INPUT).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_a_checkpoint_goes_on(kind: str) -> None:
    models = [method(**SPECS[kind]).apply(tiny(), seed=seed).eval() for seed in (1, 2)]
    models[1].load_state_dict({name: tensor.clone() for name, tensor in trained_state(models[0]).items()}, strict=False)
    assert torch.equal(models[0](INPUT).logits, models[1](INPUT).logits)


@pytest.mark.parametrize(("text", "tokens"), [("ab", "ababa"), ("abcdefgh", "abcde")])
def test_a_prompt_begins_with_the_embeddings_of_its_text(tokenizer: PreTrainedTokenizerFast, text: str, tokens: str) -> None:
    base = tiny()
    spec = {"numVirtualTokens": 5, "initText": text}
    model = method(promptTuning=spec).apply(base, seed=1, tokenizer=tokenizer)
    expected = base.get_input_embeddings().weight[torch.tensor([tokenizer.convert_tokens_to_ids(letter) for letter in tokens])]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, expected)


def test_without_a_text_it_begins_with_words_of_the_vocabulary() -> None:
    base = tiny()
    prompt = method(promptTuning={"numVirtualTokens": 5}).apply(base, seed=1).prompt_encoder["default"].embedding.weight
    words = base.get_input_embeddings().weight
    assert all(any(torch.equal(row, word) for word in words) for row in prompt)


def test_a_prefix_begins_small() -> None:
    """Keys of a hundredth of a word's barely change what a model gives; PEFT's own beginning is fifty times as large."""
    model = method(prefixTuning={"numVirtualTokens": 64}).apply(tiny(), seed=1)
    assert abs(float(model.prompt_encoder["default"].embedding.weight.detach().std()) - PREFIX_SCALE) < PREFIX_SCALE / 20


def test_a_text_without_tokens_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Deaf:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": []}

    with pytest.raises(JobError, match=r"method\.promptTuning\.initText has no tokens") as caught:
        method(promptTuning={"initText": "x"}).apply(on_meta(), seed=1, tokenizer=Deaf())  # type: ignore[arg-type]
    assert caught.value.reason == Reason.INVALID_SPEC


def test_a_prefix_is_put_beside_recomputed_activations() -> None:
    """PEFT refuses that for a cache; the trainer hands the prefix to the attention itself."""
    model = tiny()
    model.activation_checkpointing_enable({"use_reentrant": False})
    wrapped = method(prefixTuning={}).apply(model, seed=1)
    assert any(getattr(module, "gradient_checkpointing", False) for module in wrapped.modules())


def test_layers_without_keys_and_values_have_no_prefix() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        model = Lfm2ForCausalLM(Lfm2Config(**sizes, num_key_value_heads=2, layer_types=["conv", "full_attention"]))
    with pytest.raises(JobError, match=r"method\.prefixTuning: lfm2 has layers that take no keys and values \(conv\)") as caught:
        method(prefixTuning={}).apply(model, seed=1)
    assert caught.value.reason == Reason.INVALID_SPEC


def test_what_peft_makes_no_prefix_for_is_refused() -> None:
    with torch.device("meta"):
        mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(JobError, match=r"method\.prefixTuning: ") as caught:
        method(prefixTuning={}).apply(mamba, seed=1)
    assert caught.value.reason == Reason.INVALID_SPEC
