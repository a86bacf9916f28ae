"""What fits into the memory of a GPU: `finetune_api.estimate` asked about a model that is here, with or without weights. Pure."""

from typing import TYPE_CHECKING

import torch

from finetune_api.counting import Counts
from finetune_api.estimate import Held, Shape, kept_by
from finetune_api.planning import ModelSizes
from finetune_api.v1alpha1 import Method as MethodSpec
from finetune_trainer.methods.modules import decoder_layers, is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def shape_of(config: "PreTrainedConfig") -> Shape:
    """The dimensions of a text model's configuration, by transformers' common names."""
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or hidden // heads
    return Shape(
        layers=config.num_hidden_layers,
        hidden=hidden,
        inner=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
        vocabulary=config.vocab_size,
    )


def held_of(transformer: "PreTrainedModel", method: MethodSpec, precision: torch.dtype) -> Held:
    """What the activations of a model with its method in it depend on."""
    shape = shape_of(transformer.config.get_text_config())
    return Held(shape, kept_by(method), precision.itemsize, trained_layers(transformer, method))


def trained_layers(transformer: "PreTrainedModel", method: MethodSpec) -> int:
    """Layers, the last ones, whose activations the backward pass needs: with frozen layers, those after the first that trains."""
    _, layers = decoder_layers(transformer)
    embedded = any(parameter.requires_grad for parameter in transformer.get_input_embeddings().parameters())
    if method.adapter is not None and method.adapter.placement == "pfeiffer":
        return len(layers) - 1  # the first adapter stands after the first layer's blocks
    if method.freeze is None or embedded:
        return len(layers)
    training = (index for index, layer in enumerate(layers) if any(parameter.requires_grad for parameter in layer.parameters()))
    return len(layers) - next(training, len(layers))


def sizes_of_model(module: torch.nn.Module, transformer: "PreTrainedModel", method: MethodSpec, dtype: str | None) -> ModelSizes:
    """The sizes that a plan is made of. `module` is the model with its method, `dtype` the published weights' number format."""
    head, embeddings = transformer.get_output_embeddings(), transformer.get_input_embeddings()
    changed = method.full is not None or method.freeze is not None
    total = sum(parameter.numel() for parameter in module.parameters())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    own = total if changed else total - trained
    linear = (each for each in transformer.modules() if is_linear(each) and each is not head)
    packed = {id(parameter): parameter for each in linear for parameter in each.parameters(recurse=False)}
    counts = Counts(
        packed=sum(parameter.numel() for parameter in packed.values() if changed or not parameter.requires_grad),
        own=own,
        trained=trained if changed else 0,
        added=0 if changed else trained,
        trained_layers=trained_layers(transformer, method),
    )
    weights = None if head is None else getattr(head, "base_layer", head).weight
    rows = getattr(embeddings, "base_layer", embeddings).weight
    return ModelSizes(
        shape_of(transformer.config.get_text_config()),
        counts,
        embeddings=rows.numel(),
        tied=weights is rows,
        head_trains=changed and weights is not None and weights.requires_grad,
        dtype=dtype,
    )


def state_bytes(module: torch.nn.Module) -> int:
    """Bytes of a model's weights, of the gradients of those that train and of AdamW's two moments of each. The `meta` device will do."""
    return sum(parameter.numel() * parameter.itemsize * (4 if parameter.requires_grad else 1) for parameter in module.parameters())


def coming_bytes(module: torch.nn.Module) -> int:
    """The part of `state_bytes` that is not there before the first step."""
    return sum(3 * parameter.numel() * parameter.itemsize for parameter in module.parameters() if parameter.requires_grad)
