"""Attention over a flat row: several examples one after the other, each of which sees only itself.

Registered with transformers under one name, so that every architecture which takes its attention from there runs on flat rows unchanged.
The boundaries travel as keyword arguments through the model's forward (see `forward_arguments`). On a GPU in half precision one
variable-length kernel does the whole row; elsewhere one causal call per example, which computes no pair twice and builds no mask.

A model that cannot be told about boundaries (its own attention, a state that runs along the row, soft caps, sinks) gets padded rows.
`choose_layout` finds out by trying.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from finetune_trainer.cpu_attention import causal_attention
from finetune_trainer.data.tensors import Layout, MicroBatch
from finetune_trainer.soft_prompts import Prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "finetune_flat"
_KERNEL_HEAD_DIM = 256
"""Largest head that the fast kernels take, for grouped queries too."""
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "output_router_logits"}
_HARMLESS |= {"return_dict", "is_causal"}
"""Further arguments that models hand to their attention and that change nothing here."""
_NEIGHBOURS = ([1, 2, 6, 7], [8, 6, 2, 9])
"""Examples that another one comes after, to see whether it is the same after either."""


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that flat rows do not have."""


def forward_arguments(batch: MicroBatch, inputs_embeds: torch.Tensor | None = None, prefix: Prefix | None = None) -> dict[str, Any]:
    """The keyword arguments of the model's forward for a micro-batch; with embeddings instead of its tokens, or after a prefix."""
    past = prefix.tokens if prefix is not None else 0
    inputs = {"input_ids": batch.input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    arguments: dict[str, Any] = {**inputs, "use_cache": False}
    if batch.layout == "flat":
        bounds = torch.tensor([0, *batch.document_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        arguments |= {
            "position_ids": batch.position_ids + past,
            "document_lengths": batch.document_lengths,
            "document_bounds": bounds.to(batch.position_ids.device, non_blocking=True),
        }
        if prefix is not None:
            arguments["prefix"] = prefix
    elif prefix is not None:
        arguments |= {"past_key_values": _cache(prefix, len(batch.input_ids)), "position_ids": batch.position_ids + past}
    return arguments


def _cache(prefix: Prefix, lines: int) -> Any:  # noqa: ANN401 - a type of transformers
    """The prefix as the past of every line."""
    from transformers import DynamicCache

    every = (tensor.expand(lines, -1, -1, -1) for tensor in (*prefix.keys, *prefix.values))
    pairs = list(every)
    return DynamicCache(list(zip(pairs[: len(prefix.keys)], pairs[len(prefix.keys) :], strict=True)))


def flat_attention(  # noqa: PLR0913, PLR0917 - the signature that transformers calls
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_lengths: tuple[int, ...] | None = None,
    document_bounds: torch.Tensor | None = None,
    prefix: Prefix | None = None,
    **others: Any,  # noqa: ANN401 - whatever else a model hands on
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of one row; each document finds the prefix, if there is one, as its past.

    query: [1, heads, T, d]; key, value: [1, key heads, T, d]. Returns [1, T, heads, d of the value]. Raises UnsupportedAttentionError.
    """
    _check_supported(module, query, attention_mask, document_lengths, others)
    assert document_lengths is not None  # noqa: S101 - checked above
    past = _layer_of(module, prefix) if prefix is not None else None
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings in float32 make queries and keys float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if _has_kernel(query, key, value) and document_bounds is not None and not dropout:
        longest = max(document_lengths)
        if past is None:
            return by_kernel(query, key, value, scaling, sliding_window, Spans(longest, document_bounds)), None
        key, value = (_after(each, old.to(each.dtype), document_lengths) for each, old in zip((key, value), past, strict=True))
        before = past[0].shape[2]
        steps = torch.arange(len(document_bounds), dtype=torch.int32, device=document_bounds.device) * before
        spans = Spans(longest, document_bounds, document_bounds + steps, before)
        return by_kernel(query, key, value, scaling, sliding_window, spans), None
    parts = zip(*(torch.split(tensor, list(document_lengths), dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_one_document(*part, dropout=dropout, scaling=scaling, window=sliding_window, past=past) for part in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _layer_of(module: torch.nn.Module, prefix: Prefix) -> tuple[torch.Tensor, torch.Tensor]:
    """The prefix's keys and values for the layer that asks."""
    index: Any = getattr(module, "layer_idx", None)
    if index is None:
        raise UnsupportedAttentionError("the model's attention does not know which layer it is in")
    return prefix.keys[index], prefix.values[index]


def _after(tensor: torch.Tensor, past: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Keys or values with the past before each document: [1, heads, T + N V, d]."""
    return torch.cat([piece for part in torch.split(tensor, list(lengths), dim=2) for piece in (past, part)], dim=2)


def _check_supported(
    module: torch.nn.Module,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: tuple[int, ...] | None,
    others: dict[str, Any],
) -> None:
    wanted = sorted(name for name, value in others.items() if name not in _HARMLESS and value is not None)
    if wanted:
        raise UnsupportedAttentionError(f"the model's attention takes {', '.join(wanted)}")
    if mask is not None or lengths is None or query.shape[0] != 1 or sum(lengths) != query.shape[2]:
        raise UnsupportedAttentionError("the model does not hand the row to its attention as it is")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise UnsupportedAttentionError("the model's attention is not causal")


def _one_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """One document's attention: [1, heads, t, d]."""
    before = 0
    if past is not None:
        # As many queries that nobody reads make it square, so that plain causal attention is right.
        before = past[0].shape[2]
        key, value = torch.cat([past[0].to(key.dtype), key], dim=2), torch.cat([past[1].to(value.dtype), value], dim=2)
        query = functional.pad(query, (0, 0, before, 0))
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        place = torch.arange(length, device=query.device)
        distance = place[:, None] - place[None, :]
        mask = (distance >= 0) & (distance < window)
    if query.device.type == "cpu" and query.dtype == key.dtype == value.dtype == torch.bfloat16 and mask is None and not dropout:
        return causal_attention(query, key, value, scaling or query.shape[3] ** -0.5)[:, :, before:]
    grouped = key.shape[1] != query.shape[1]
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return output[:, :, before:]


def _has_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= _KERNEL_HEAD_DIM
    )


@dataclass(frozen=True)
class Spans:
    """Where the documents of a row begin and end, for the kernel."""

    longest: int
    bounds: torch.Tensor
    """int32 [N + 1]: of the queries."""
    key_bounds: torch.Tensor | None = None
    """int32 [N + 1]: of the keys, where each document has a past; else those of the queries."""
    past: int = 0
    """Keys of each document before its own."""


def by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None, spans: Spans
) -> torch.Tensor:
    """The whole row in one FlashAttention call of torch's own: [1, T, heads, d].

    A query sees the keys up to its own, counted from the documents' ends.
    """
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, values = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
    reach = (-1 if window is None else window - 1, 0)
    grouped = keys.shape[1] != queries.shape[1]
    key_bounds = spans.bounds if spans.key_bounds is None else spans.key_bounds
    output = varlen_attn(
        queries, keys, values, spans.bounds, key_bounds, spans.longest, spans.longest + spans.past,
        scale=scaling, window_size=reach, enable_gqa=grouped,
    )  # fmt: skip
    assert isinstance(output, torch.Tensor)  # noqa: S101 - a pair only where the log-sum-exp is asked for
    return output.unsqueeze(0)


def choose_layout(model: "PreTrainedModel") -> Layout:
    """Set the model up for flat rows and try one: flat where an example comes out as it does alone, whatever stands before it.

    Else padded, and the model is left as it was.
    """
    from transformers import AttentionInterface

    before = model.config._attn_implementation
    if not model._supports_attention_backend or model._is_stateful:
        return "padded"
    AttentionInterface.register(NAME, flat_attention)
    alone = _last_hidden(model, probe([[3, 4, 5]], "padded"))
    model.set_attn_implementation(NAME)
    try:
        together, otherwise = (_last_hidden(model, probe([first, [3, 4, 5]], "flat"))[:, len(first) :] for first in _NEIGHBOURS)
        with torch.no_grad():
            model(**forward_arguments(probe([[3, 4, 5]], "flat").to(model.device)))  # which may hand on more than its decoder alone
    except (UnsupportedAttentionError, TypeError):
        isolated = False
    else:
        # Two ways to compute the same may differ by as much as rounding does; what a neighbour changes is a leak, however small.
        rounding, leak = (1e-4, 1e-4) if alone.dtype == torch.float32 else (5e-2, 1e-2)
        is_same = (together - alone).abs().max() <= rounding * alone.abs().max()
        isolated = bool(is_same and (together - otherwise).abs().max() <= leak * together.abs().mean())
    if not isolated:
        model.set_attn_implementation(before)
    return "flat" if isolated else "padded"


def use_flat_attention(model: "PreTrainedModel") -> None:
    """Set a model up for flat rows that is known to be fit for them."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, flat_attention)
    model.set_attn_implementation(NAME)


def compile_around_flat_attention() -> None:
    """Have torch.compile leave flat attention as it is."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, torch.compiler.disable(flat_attention))  # type: ignore[no-untyped-call]


@torch.no_grad()
def _last_hidden(model: "PreTrainedModel", batch: MicroBatch) -> torch.Tensor:
    decoder = model.get_decoder()
    was_training = decoder.training
    decoder.eval()
    hidden: torch.Tensor = decoder(**forward_arguments(batch.to(model.device))).last_hidden_state
    decoder.train(was_training)
    return hidden


def probe(documents: list[list[int]], layout: Layout) -> MicroBatch:
    """A few tokens that every vocabulary has."""
    ids = torch.tensor([[token for document in documents for token in document]])
    positions = torch.tensor([[place for document in documents for place in range(len(document))]])
    nothing = torch.empty(0, dtype=torch.int64)
    return MicroBatch(ids, nothing, positions, nothing, tuple(map(len, documents)), layout)
