"""How many parameters a method adds to an architecture, and how many of the model's own it trains: arithmetic over their shapes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune_api.architecture import Architecture, Module
from finetune_api.methods import AdapterMethod, FreezeMethod, Ia3Method, LoraMethod, Method, PrefixTuningMethod, PTuningMethod

_IA3_TARGETS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "mistral": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen2": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen3": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gemma": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
}
"""Modules that PEFT rescales where the spec names none, and those of them whose inputs it rescales."""


@dataclass(frozen=True)
class Counts:
    """Parameters of a model under a method."""

    packed: int
    """The model's own in linear layers but the output layer: those that model.quantization packs."""
    own: int
    """All of the model's own."""
    trained: int
    """Those of the model's own that train."""
    added: int
    """What the method adds; all of it trains."""
    trained_layers: int
    """Layers, the last ones, whose activations the backward pass needs: those after the first that trains."""


def counts_of(architecture: Architecture, method: Method) -> Counts:
    """The counts for a model of a known architecture."""
    own, packed = architecture.parameters, sum(module.parameters for module in architecture.linear())
    if method.full is not None:
        return Counts(packed, own, own, 0, architecture.layers)
    if method.freeze is not None:
        chosen = _frozen_but(architecture, method.freeze)
        trained = sum(module.parameters for module in architecture.modules if module in chosen)
        return Counts(packed, own, trained, 0, _layers_from_the_first(architecture, chosen))
    # The first adapter stands after the first layer's blocks: nothing before it needs a gradient.
    behind = method.adapter is not None and method.adapter.placement == "pfeiffer"
    return Counts(packed, own, 0, _added(architecture, method), architecture.layers - behind)


def _frozen_but(architecture: Architecture, spec: FreezeMethod) -> set[Module]:
    """The modules that train. Tied weights train where either of the two modules does."""
    if spec.modules is not None:
        chosen = {module for pattern in spec.modules for module in architecture.matching(pattern)}
    else:
        last = range(architecture.layers - (spec.last_layers or 0), architecture.layers)
        chosen = {module for index in last for module in architecture.of_layer(index)}
    (embedding, *_), head = architecture.modules, architecture.modules[-1]
    if spec.embeddings or ((spec.head or head in chosen) and head.tied):
        chosen.add(embedding)
    if spec.head:
        chosen.add(head)
    return chosen


def _layers_from_the_first(architecture: Architecture, chosen: set[Module]) -> int:
    if any(module.kind == "embedding" for module in chosen):
        return architecture.layers
    first = (index for index in range(architecture.layers) if chosen.intersection(architecture.of_layer(index)))
    return architecture.layers - next(first, architecture.layers)


def _added(architecture: Architecture, method: Method) -> int:
    if method.lora is not None:
        return _lora(_targets(architecture, method.lora.target_modules), method.lora)
    if method.adapter is not None:
        return _bottlenecks(architecture, method.adapter)
    if method.ia3 is not None:
        return _ia3(architecture, method.ia3)
    if method.prefix_tuning is not None:
        return _prefix(architecture, method.prefix_tuning)
    if method.p_tuning is not None:
        return _p_tuning(architecture.hidden, method.p_tuning)
    return method.prompt_tuning.num_virtual_tokens * architecture.hidden if method.prompt_tuning is not None else 0


def _targets(architecture: Architecture, patterns: Iterable[str]) -> set[Module]:
    return {module for pattern in patterns for module in architecture.matching(pattern)}


def _lora(targets: set[Module], spec: LoraMethod) -> int:
    """Two matrices of the rank beside each weight matrix; DoRA adds the lengths of its rows."""
    lengths = sum(module.outputs for module in targets) if spec.variant == "dora" else 0
    return sum(spec.rank * (module.inputs + module.outputs) for module in targets) + lengths


def _bottlenecks(architecture: Architecture, spec: AdapterMethod) -> int:
    """A projection down and up, with biases, after one or both blocks of each layer."""
    inner = max(1, int(architecture.hidden / spec.reduction_factor))
    blocks = architecture.layers * (2 if spec.placement == "houlsby" else 1)
    return blocks * (2 * architecture.hidden * inner + inner + architecture.hidden)


def _ia3(architecture: Architecture, spec: Ia3Method) -> int:
    known = _IA3_TARGETS[architecture.family]
    names = (spec.target_modules, spec.feed_forward_modules or ()) if spec.target_modules is not None else known
    targets, inner = _targets(architecture, names[0]), _targets(architecture, names[1])
    return sum(module.inputs if module in inner else module.outputs for module in targets)


def _prefix(architecture: Architecture, spec: PrefixTuningMethod) -> int:
    """Keys and values of every layer; with a projection an embedding and two layers that they come from."""
    tokens, width = spec.num_virtual_tokens, architecture.keys
    if spec.projection_size is None:
        return tokens * 2 * architecture.layers * width
    size, made = spec.projection_size, 2 * architecture.layers * width
    return tokens * width + (width + 1) * size + (size + 1) * made


def _p_tuning(hidden: int, spec: PTuningMethod) -> int:
    """Embeddings, and an encoder of three linear layers, or of an LSTM in both directions and two linear layers."""
    embedding, size = spec.num_virtual_tokens * hidden, spec.encoder_hidden_size
    if spec.encoder == "mlp":
        return embedding + (hidden + 1) * size + (size + 1) * size + (size + 1) * hidden
    inputs = (hidden, *[2 * size] * (spec.encoder_layers - 1))
    lstm = sum(2 * (4 * size * (each + size) + 8 * size) for each in inputs)
    return embedding + lstm + (2 * size + 1) * 2 * size + (2 * size + 1) * hidden
