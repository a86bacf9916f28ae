"""Causal attention of one document on a CPU in half precision: some queries at a time, each against the keys up to its own.

torch's own kernel for CPUs is no faster in bfloat16 than in float32, while its matrix products are several times as fast. So the products
are made one by one, in blocks that stay in the caches; the probabilities are computed a second time on the way back rather than kept
(as in Dao et al. 2022). The scores are rounded to the inputs' number format, as in every attention that is not fused.
"""

from functools import lru_cache
from typing import Any

import torch

BLOCK = 64
"""Queries at a time."""


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """query: [1, heads, t, d]; key: [1, key heads, t, d]; value: [1, key heads, t, e], heads a multiple of key heads. [1, heads, t, e]."""
    output: torch.Tensor = _CausalAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return output


class _CausalAttention(torch.autograd.Function):
    """All heads that share a key head are taken as more rows of it: row i * heads + j is query i of head j."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: ANN401
        shared = query.shape[1] // key.shape[1]
        queries, keys, values = _rows(query, shared).mul_(scale), key[0], value[0]
        outputs = queries.new_empty(*queries.shape[:2], value.shape[3])
        for start, stop in _blocks(query.shape[2]):
            rows = slice(start * shared, stop * shared)
            outputs[:, rows] = torch.bmm(_probabilities(queries[:, rows], keys[:, :stop], start), values[:, :stop])
        ctx.save_for_backward(queries, key, value, outputs)
        ctx.scale, ctx.shared = scale, shared
        return _heads(outputs, shared)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        queries, key, value, outputs = ctx.saved_tensors
        shared, keys, values = ctx.shared, key[0], value[0]
        slopes = _rows(slope, shared)
        # The gradient of a softmax takes off the mean of what comes in, weighed by the probabilities: it follows from the output alone.
        means = (slopes * outputs).sum(dim=2, keepdim=True, dtype=torch.float32)
        grad_queries = torch.empty_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys, dtype=torch.float32), torch.zeros_like(values, dtype=torch.float32)
        for start, stop in _blocks(key.shape[2]):
            rows = slice(start * shared, stop * shared)
            probabilities = _probabilities(queries[:, rows], keys[:, :stop], start)
            grad_values[:, :stop] += torch.bmm(probabilities.transpose(1, 2), slopes[:, rows])
            scores = torch.bmm(slopes[:, rows], values[:, :stop].transpose(1, 2)).sub_(means[:, rows]).mul_(probabilities)
            grad_queries[:, rows] = torch.bmm(scores, keys[:, :stop])
            grad_keys[:, :stop] += torch.bmm(scores.transpose(1, 2), queries[:, rows])
        return _heads(grad_queries.mul_(ctx.scale), shared), grad_keys.to(key.dtype)[None], grad_values.to(value.dtype)[None], None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


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


@lru_cache(maxsize=2 * BLOCK)
def _later(length: int, dtype: torch.dtype) -> torch.Tensor:
    """-inf for each key after the query, [n, n]."""
    return torch.full((length, length), -torch.inf, dtype=dtype).triu_(1)
