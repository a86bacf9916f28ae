"""Soft prompts: trained vectors that stand before each example, as embeddings or as keys and values of every layer.

PEFT holds and saves them; here they are put before every example of a micro-batch, in either layout, so that the rest of the trainer
does not know of them: what comes out is of the examples' own tokens again.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer.data.tensors import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = ("PROMPT_TUNING", "P_TUNING")
"""PEFT's types whose prompt is a sequence of embeddings."""
CACHED = "PREFIX_TUNING"
"""PEFT's type whose prompt is the keys and values of a past."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of every layer, [1, key heads, V, d] each: what every example finds as its past."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def tokens(self) -> int:
        """V, the number of virtual tokens."""
        return self.keys[0].shape[2]


@dataclass(frozen=True)
class Prompted:
    """A micro-batch with the prompt before each example, and the way back."""

    batch: MicroBatch
    embeddings: torch.Tensor
    """[1, T + N V, H] or [B, V + T, H]."""
    own: torch.Tensor
    """Where in the flattened batch the positions of the micro-batch without the prompt are, in their order."""

    def taken_off(self, hidden: torch.Tensor, like: MicroBatch) -> torch.Tensor:
        """The hidden states [.., .., H] of the positions of `like`, in its shape."""
        return hidden.flatten(0, 1)[self.own].view(*like.input_ids.shape, hidden.shape[-1])


def prompt_type(module: torch.nn.Module) -> str | None:
    """PEFT's type of a module's soft prompt; None where it has none."""
    config: Any = getattr(module, "active_peft_config", None) if hasattr(module, "peft_config") else None
    kind = config.peft_type.value if config is not None else None
    return kind if kind in (*EMBEDDED, CACHED) else None


def virtual_tokens(module: torch.nn.Module) -> int:
    """Places that a module's soft prompt takes before each example: 0 where it has none."""
    config: Any = getattr(module, "active_peft_config", None) if prompt_type(module) is not None else None
    return int(config.num_virtual_tokens) if config is not None else 0


def prompted(module: torch.nn.Module, transformer: "PreTrainedModel", batch: MicroBatch) -> Prompted:
    """The batch with the module's trained embeddings before each example."""
    peft_model: Any = module
    prompt = peft_model.get_prompt(batch_size=1)[0]
    words = transformer.get_input_embeddings()(batch.input_ids)
    prompt = prompt.to(words.dtype)
    count, hidden = prompt.shape
    lengths = tuple(count + length for length in batch.document_lengths)
    if batch.layout == "padded":
        embeddings = torch.cat([prompt.expand(len(words), count, hidden), words], dim=1)
        width = embeddings.shape[1]
        line = torch.arange(width, device=words.device)
        own = (torch.arange(len(words), device=words.device)[:, None] * width + line[count:]).flatten()
        longer = replace(batch, position_ids=line.expand(len(words), width), document_lengths=lengths)
        return Prompted(longer, embeddings, own)
    parts = torch.split(words[0], list(batch.document_lengths))
    embeddings = torch.cat([piece for part in parts for piece in (prompt, part)])[None]
    places = [torch.arange(length) for length in lengths]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    own = torch.cat([start + place[count:] for start, place in zip(starts, places, strict=True)]).to(words.device)
    longer = replace(batch, position_ids=torch.cat(places)[None].to(words.device), document_lengths=lengths)
    return Prompted(longer, embeddings, own)


def prefix_of(module: torch.nn.Module) -> Prefix:
    """The module's trained keys and values."""
    peft_model: Any = module
    cache = peft_model.get_prompt(batch_size=1)
    return Prefix(tuple(layer.keys for layer in cache.layers), tuple(layer.values for layer in cache.layers))
