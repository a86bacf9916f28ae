"""What fits into the memory of a GPU: estimates, before anything is tried. Pure."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune_api.v1alpha1 import Training
from finetune_trainer.data.batches import AUTO_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STATE_SHARE = 0.75
"""Share of a GPU's memory that weights, gradients and moments may take; the rest is for activations."""
ACTIVATION_SHARE = 0.6
"""Share of the free memory that activations may take: the estimate is rough, and the allocator needs room."""
MOST_TOKENS = 4 * AUTO_TOKENS["cuda"]
"""Tokens of a micro-batch that no GPU computes faster with more."""


@dataclass(frozen=True)
class Activations:
    """How a model's activations are to be held."""

    recomputed: bool
    """Whether those within a layer are computed again in the backward pass."""
    tokens: int
    """Tokens that a micro-batch may have."""


def activation_bytes(config: "PreTrainedConfig", tokens: int, precision: torch.dtype) -> int:
    """About how much a forward pass over so many tokens leaves behind for the backward pass.

    For each layer and token the inputs of the linear layers and norms, queries, keys, values, and the products of the feed-forward part:
    some 16 numbers for each hidden unit and 4 for each of the feed-forward part's.
    """
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return int(config.num_hidden_layers * tokens * (16 * hidden + 4 * inner) * precision.itemsize)


def plan_activations(config: "PreTrainedConfig", training: Training, precision: torch.dtype, free: int) -> Activations:
    """What to do with so many free bytes. Activations are recomputed where memory asks for it, or the training does."""
    longest = training.max_sequence_length
    wanted = max(AUTO_TOKENS["cuda"], longest) if training.micro_batch_size == "auto" else training.micro_batch_size * longest
    whole = activation_bytes(config, 1, precision)
    recomputed = {"always": True, "never": False}.get(training.gradient_checkpointing, wanted * whole > ACTIVATION_SHARE * free)
    # Recomputed: the input of each layer, and all of the one layer that is being computed again.
    layers = config.num_hidden_layers
    each = layers * config.hidden_size * precision.itemsize + whole // layers if recomputed else whole
    return Activations(recomputed, max(longest, min(MOST_TOKENS, int(ACTIVATION_SHARE * free / each))))


def state_bytes(module: torch.nn.Module) -> int:
    """Bytes of a model's weights, of the gradients of those that train and of AdamW's two moments of each. The `meta` device will do."""
    return sum(parameter.numel() * parameter.itemsize * (4 if parameter.requires_grad else 1) for parameter in module.parameters())


def coming_bytes(module: torch.nn.Module) -> int:
    """The part of `state_bytes` that is not there before the first step."""
    return sum(3 * parameter.numel() * parameter.itemsize for parameter in module.parameters() if parameter.requires_grad)
