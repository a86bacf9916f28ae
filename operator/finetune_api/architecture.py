"""The weights of a language model from its config.json alone: names, shapes and sizes, without a library and without the weights.

Known are decoders in the forms of Llama, Qwen 2 and 3, Mistral, Gemma and GPT-2, as transformers builds them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["embedding", "linear", "norm", "head"]
Config = Mapping[str, Any]
DTYPES = ("float32", "float16", "bfloat16")


class UnknownArchitectureError(ValueError):
    """The configuration is not of a form that is known here. The message says what is known."""


@dataclass(frozen=True)
class Module:
    """A module that holds weights of its own."""

    name: str
    kind: Kind
    inputs: int
    """Inputs of a linear layer; rows of an embedding; size of a norm."""
    outputs: int
    """Outputs of a linear layer; columns of an embedding; 1 of a norm."""
    biases: int = 0
    tied: bool = False
    """The output layer whose weights are the input embeddings'."""

    @property
    def parameters(self) -> int:
        """Weights that are its own."""
        return 0 if self.tied else self.inputs * self.outputs + self.biases


@dataclass(frozen=True)
class Architecture:
    """A decoder, by its dimensions and its modules."""

    family: str
    """transformers' model_type."""
    hidden: int
    inner: int
    """Width of the feed-forward part."""
    layers: int
    keys: int
    """Width of the keys, and of the values, of all heads."""
    vocabulary: int
    dtype: str | None
    """Number format of the published weights, where the configuration says it."""
    modules: tuple[Module, ...]

    @property
    def parameters(self) -> int:
        """All weights."""
        return sum(module.parameters for module in self.modules)

    def of_layer(self, index: int) -> tuple[Module, ...]:
        """The modules of one layer, counted from 0."""
        mark = f".{index}."
        return tuple(module for module in self.modules if mark in module.name)

    def linear(self) -> tuple[Module, ...]:
        """Linear layers but the output layer."""
        return tuple(module for module in self.modules if module.kind == "linear")

    def matching(self, pattern: str) -> tuple[Module, ...]:
        """Modules that a pattern means, or that are inside of one that it means; all-linear stands for every linear layer."""
        if pattern == "all-linear":
            return self.linear()
        meant = module_pattern(pattern)
        return tuple(module for module in self.modules if any(meant.fullmatch(name) for name in _names_down_to(module.name)))


def module_pattern(pattern: str) -> re.Pattern[str]:
    """What the full name of a module matches that a pattern means: the end of its name, in which `*` stands for any characters."""
    return re.compile(r"(.*\.)?" + re.escape(pattern).replace(r"\*", ".*"))


def architecture_of(config: Config) -> Architecture:
    """The architecture of a config.json. Raises UnknownArchitectureError."""
    family = config.get("model_type")
    build = _FAMILIES.get(family) if isinstance(family, str) else None
    if build is None:
        raise UnknownArchitectureError(f"model_type {family} is not known here, only {', '.join(_FAMILIES)}; a job with planOnly counts it")
    return build(config)


def _names_down_to(name: str) -> Iterator[str]:
    """`a`, `a.b` and `a.b.c` of `a.b.c`."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _number(config: Config, name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnknownArchitectureError(f"the model's config.json has no whole number {name}")
    return value


def _dtype(config: Config) -> str | None:
    dtype = config.get("dtype") or config.get("torch_dtype")
    return dtype if dtype in DTYPES else None


@dataclass(frozen=True)
class _Attention:
    """Which of its layers have biases, and whether queries and keys are normed."""

    inputs_biased: bool = False
    output_biased: bool = False
    norms: bool = False


def _like_llama(config: Config, attention: _Attention, *, tied: bool, head_size: int | None = None) -> Architecture:
    """Norm, attention with grouped keys and values, norm, a gated feed-forward part: the form that most decoders have."""
    hidden, inner, layers = (_number(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, vocabulary = _number(config, "num_attention_heads"), _number(config, "vocab_size")
    size = _number(config, "head_dim", head_size or hidden // heads)
    queries, keys = heads * size, _number(config, "num_key_value_heads", heads) * size
    biased = bool(config.get("mlp_bias", False)) and config["model_type"] == "llama"

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> Module:
        return Module(name, "linear", inputs, outputs, outputs if bias else 0)

    def layer(index: int) -> Iterator[Module]:
        at = f"model.layers.{index}"
        yield linear(f"{at}.self_attn.q_proj", hidden, queries, attention.inputs_biased)
        yield linear(f"{at}.self_attn.k_proj", hidden, keys, attention.inputs_biased)
        yield linear(f"{at}.self_attn.v_proj", hidden, keys, attention.inputs_biased)
        yield linear(f"{at}.self_attn.o_proj", queries, hidden, attention.output_biased)
        if attention.norms:
            yield from (Module(f"{at}.self_attn.{name}", "norm", size, 1) for name in ("q_norm", "k_norm"))
        yield linear(f"{at}.mlp.gate_proj", hidden, inner, biased)
        yield linear(f"{at}.mlp.up_proj", hidden, inner, biased)
        yield linear(f"{at}.mlp.down_proj", inner, hidden, biased)
        yield from (Module(f"{at}.{name}", "norm", hidden, 1) for name in ("input_layernorm", "post_attention_layernorm"))

    modules = (
        Module("model.embed_tokens", "embedding", vocabulary, hidden),
        *(module for index in range(layers) for module in layer(index)),
        Module("model.norm", "norm", hidden, 1),
        Module("lm_head", "head", hidden, vocabulary, tied=bool(config.get("tie_word_embeddings", tied))),
    )
    return Architecture(config["model_type"], hidden, inner, layers, keys, vocabulary, _dtype(config), modules)


def _biased(config: Config) -> _Attention:
    every = bool(config.get("attention_bias", False))
    return _Attention(every, every)


def _gpt2(config: Config) -> Architecture:
    """GPT-2: learned positions, one layer for queries, keys and values, a feed-forward part without a gate, biases everywhere."""
    hidden, layers, vocabulary = (_number(config, name) for name in ("n_embd", "n_layer", "vocab_size"))
    inner = _number(config, "n_inner", 4 * hidden)

    def linear(name: str, inputs: int, outputs: int) -> Module:
        return Module(name, "linear", inputs, outputs, outputs)

    def layer(index: int) -> Iterator[Module]:
        at = f"transformer.h.{index}"
        yield Module(f"{at}.ln_1", "norm", hidden, 1, hidden)
        yield linear(f"{at}.attn.c_attn", hidden, 3 * hidden)
        yield linear(f"{at}.attn.c_proj", hidden, hidden)
        yield Module(f"{at}.ln_2", "norm", hidden, 1, hidden)
        yield linear(f"{at}.mlp.c_fc", hidden, inner)
        yield linear(f"{at}.mlp.c_proj", inner, hidden)

    modules = (
        Module("transformer.wte", "embedding", vocabulary, hidden),
        Module("transformer.wpe", "embedding", _number(config, "n_positions", 1024), hidden),
        *(module for index in range(layers) for module in layer(index)),
        Module("transformer.ln_f", "norm", hidden, 1, hidden),
        Module("lm_head", "head", hidden, vocabulary, tied=bool(config.get("tie_word_embeddings", True))),
    )
    return Architecture("gpt2", hidden, inner, layers, hidden, vocabulary, _dtype(config), modules)


_FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "llama": lambda config: _like_llama(config, _biased(config), tied=False),
    "qwen2": lambda config: _like_llama(config, _Attention(inputs_biased=True), tied=False),
    "qwen3": lambda config: _like_llama(config, replace(_biased(config), norms=True), tied=False, head_size=128),
    "mistral": lambda config: _like_llama(config, _Attention(), tied=False),
    "gemma": lambda config: _like_llama(config, _biased(config), tied=True, head_size=256),
    "gpt2": _gpt2,
}
