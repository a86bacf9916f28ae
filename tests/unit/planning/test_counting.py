"""Weights counted from config.json are those that transformers and PEFT make of it, name by name and for every method."""

import json

import pytest
import torch
from tests.unit.trainer.tiny_models import job_manifest
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from finetune_api.architecture import UnknownArchitectureError, architecture_of
from finetune_api.counting import counts_of
from finetune_api.methods import Method
from finetune_api.planning import sizes_of
from finetune_api.v1alpha1 import parse_job
from finetune_trainer.memory import sizes_of_model
from finetune_trainer.methods import method_for
from finetune_trainer.methods.method import count_parameters

SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "llama-biased-tied": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-head": LlamaConfig(**GROUPED, head_dim=32),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2-tied": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, head_dim=24, tie_word_embeddings=True),
    "mistral": MistralConfig(**GROUPED),
    "gemma": GemmaConfig(**GROUPED, head_dim=32),
    "gpt2": GPT2Config(vocab_size=300, n_positions=128, n_embd=64, n_layer=3, n_head=4),
}
METHODS: list[dict[str, object]] = [
    {"full": {}},
    {"freeze": {"lastLayers": 1}},
    {"freeze": {"lastLayers": 2, "embeddings": True, "head": True}},
    {"freeze": {"lastLayers": 1, "head": True}},
    {"lora": {}},
    {"lora": {"rank": 3, "variant": "dora"}},
    {"adapter": {}},
    {"adapter": {"reductionFactor": 5, "placement": "houlsby"}},
    {"ia3": {}},
    {"promptTuning": {"numVirtualTokens": 7}},
    {"prefixTuning": {"numVirtualTokens": 7}},
    {"prefixTuning": {"projectionSize": 33}},
    {"pTuning": {}},
    {"pTuning": {"encoder": "lstm", "encoderHiddenSize": 20, "encoderLayers": 3, "encoderDropout": 0.1}},
]
NAMED = [
    {"freeze": {"modules": ["layers.1", "mlp.down_proj", "norm"]}},
    {"freeze": {"modules": ["layers.*.self_attn"]}},
    {"lora": {"targetModules": ["q_proj", "layers.2.mlp.up_proj", "embed_tokens"]}},
    {"ia3": {"targetModules": ["up_proj", "o_proj"], "feedForwardModules": ["o_proj"]}},
]


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def stored(config: PreTrainedConfig) -> dict[str, object]:
    """The configuration as it lies beside a model's weights."""
    return json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_modules_are_those_of_transformers(name: str) -> None:
    known = architecture_of(stored(CONFIGS[name]))
    theirs = {
        module: sum(each.numel() for each in found.parameters(recurse=False)) for module, found in on_meta(CONFIGS[name]).named_modules()
    }
    assert {module.name: module.parameters for module in known.modules if not module.tied} == {
        module: count for module, count in theirs.items() if count and not (module == "lm_head" and known.modules[-1].tied)
    }


@pytest.mark.parametrize("method", METHODS, ids=json.dumps)
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "qwen3", "gemma", "gpt2"])
def test_what_a_method_adds_and_trains_is_what_peft_does(name: str, method: dict[str, object]) -> None:
    check(name, method)


@pytest.mark.parametrize("method", NAMED, ids=json.dumps)
def test_modules_are_meant_by_the_same_names(method: dict[str, object]) -> None:
    check("mistral", method)


def check(name: str, method: dict[str, object]) -> None:
    spec = Method.model_validate_json(json.dumps(method))
    transformer = on_meta(CONFIGS[name])
    module = method_for(spec).apply(transformer, seed=0)
    found, known = count_parameters(module), architecture_of(stored(CONFIGS[name]))
    counted = counts_of(known, spec)
    assert (counted.own + counted.added, counted.trained + counted.added) == (found.parameters, found.trained_parameters)
    # Both sides of the plan, the one that has only config.json and the one that has the model, bring the same sizes.
    job = parse_job(job_manifest(method=method), local=True).spec
    assert sizes_of(known, job) == sizes_of_model(module, transformer, spec, known.dtype)


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ({"full": {}}, 3),
        ({"lora": {}}, 3),
        ({"adapter": {}}, 2),
        ({"adapter": {"placement": "houlsby"}}, 3),
        ({"freeze": {"lastLayers": 2}}, 2),
        ({"freeze": {"modules": ["layers.1.mlp"]}}, 2),
        ({"freeze": {"modules": ["model.norm"]}}, 0),
        ({"freeze": {"lastLayers": 1, "embeddings": True}}, 3),
    ],
    ids=json.dumps,
)
def test_activations_are_kept_from_the_first_layer_that_trains(method: dict[str, object], layers: int) -> None:
    spec = Method.model_validate_json(json.dumps(method))
    assert counts_of(architecture_of(stored(CONFIGS["llama"])), spec).trained_layers == layers


def test_a_published_model_has_the_size_that_it_is_known_by() -> None:
    """Llama 3.1 8B: 8,030,261,248 parameters, as its model card and its safetensors index have it."""
    config = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    known = architecture_of(config)
    assert (known.parameters, known.dtype) == (8_030_261_248, "bfloat16")


@pytest.mark.parametrize(
    ("config", "words"), [({"model_type": "mamba"}, "mamba is not known"), ({"model_type": "llama"}, "hidden_size"), ({}, "None")]
)
def test_what_is_not_known_is_said(config: dict[str, object], words: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=words):
        architecture_of(config)
