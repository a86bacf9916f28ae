"""Causal attention of one document on a CPU in half precision: some queries at a time, each against the keys up to its own.

torch's own kernel for CPUs is no faster in bfloat16 than in float32, while its matrix products are several times as fast. So the products
are made one by one, in blocks that stay in the caches. The probabilities of a short document are kept for the way back, which are few
beside what the other layers keep; those of a long one are computed a second time (as in Dao et al. 2022). The scores are rounded to the
inputs' number format, as in every attention that is not fused.
"""

from functools import lru_cache
from typing import Any

import torch

KEPT = 512
"""Tokens of the longest document whose probabilities are kept."""
SHORT_BLOCK, BLOCK = 128, 64
"""Queries at a time, of a document that is short and of one that is not."""


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """query: [1, heads, t, d]; key: [1, key heads, t, d]; value: [1, key heads, t, e], heads a multiple of key heads. [1, heads, t, e]."""
    output: torch.Tensor = _CausalAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return output


class _CausalAttention(torch.autograd.Function):
    """All heads that share a key head are taken as more rows of it: row i * heads + j is query i of head j."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: ANN401
        shared, length = query.shape[1] // key.shape[1], query.shape[2]
        queries, keys, values = _rows(query, shared).mul_(scale), key[0].contiguous(), value[0].contiguous()
        outputs, kept = [], []
        for start, stop in _blocks(length):
            probabilities = _probabilities(queries[:, start * shared : stop * shared], keys[:, :stop], start)
            outputs.append(torch.bmm(probabilities, values[:, :stop]))
            if length <= KEPT:
                kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.scale, ctx.shared = scale, shared
        return _heads(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), shared)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        queries, keys, values, *kept = ctx.saved_tensors
        shared, slopes, blocks = ctx.shared, _rows(slope, ctx.shared), _blocks(keys.shape[1])
        grad_queries = []
        # The last block sees all keys, so what it gives is what the others are added to: in float32, where there are others.
        grad_keys = grad_values = keys.new_empty(0)
        for start, stop in reversed(blocks):
            rows = slice(start * shared, stop * shared)
            probabilities = kept.pop() if kept else _probabilities(queries[:, rows], keys[:, :stop], start)
            for_values = torch.bmm(probabilities.transpose(1, 2), slopes[:, rows])
            by_probabilities = torch.bmm(slopes[:, rows], values[:, :stop].transpose(1, 2))
            by_scores = torch._softmax_backward_data(by_probabilities, probabilities, 2, probabilities.dtype)
            grad_queries.append(torch.bmm(by_scores, keys[:, :stop]))
            for_keys = torch.bmm(by_scores.transpose(1, 2), queries[:, rows])
            if grad_keys.numel():
                grad_keys[:, :stop] += for_keys
                grad_values[:, :stop] += for_values
            else:
                wide = torch.float32 if len(blocks) > 1 else keys.dtype
                grad_keys, grad_values = for_keys.to(wide), for_values.to(wide)
        grad_query = (grad_queries[0] if len(blocks) == 1 else torch.cat(grad_queries[::-1], dim=1)).mul_(ctx.scale)
        return _heads(grad_query, shared), grad_keys.to(keys.dtype)[None], grad_values.to(keys.dtype)[None], None


def _blocks(length: int) -> list[tuple[int, int]]:
    size = SHORT_BLOCK if length <= KEPT else BLOCK
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _rows(tensor: torch.Tensor, shared: int) -> torch.Tensor:
    """[1, heads, t, x] as [key heads, t * shared, x], a copy."""
    _, heads, length, width = tensor.shape
    rows = tensor.new_empty(heads // shared, length, shared, width)
    rows.copy_(tensor.view(heads // shared, shared, length, width).transpose(1, 2))
    return rows.view(heads // shared, length * shared, width)


def _heads(rows: torch.Tensor, shared: int) -> torch.Tensor:
    """The other way round, a view."""
    key_heads, _, width = rows.shape
    return rows.view(key_heads, -1, shared, width).transpose(1, 2).flatten(0, 1)[None]


def _probabilities(queries: torch.Tensor, keys: torch.Tensor, start: int) -> torch.Tensor:
    """Of a block of rows, of which the first is of the document's query `start`, for the keys up to the last: [key heads, rows, keys]."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    own = scores.shape[2] - start
    scores.view(len(scores), own, -1, scores.shape[2])[..., start:].add_(_later(own, scores.dtype)[:, None])
    return torch.softmax(scores, dim=2)


@lru_cache(maxsize=2 * SHORT_BLOCK)
def _later(length: int, dtype: torch.dtype) -> torch.Tensor:
    """-inf for each key after the query, [n, n]."""
    return torch.full((length, length), -torch.inf, dtype=dtype).triu_(1)
