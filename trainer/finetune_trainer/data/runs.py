"""Hashes of runs of tokens, many at once: equal runs have equal hashes, wherever they stand. Pure.

A run's hash is the polynomial sum(x[i] * a**i) modulo 2**64 of its tokens, each mixed to 64 bits, and is read off prefix sums: a run costs
the same whatever its length. Of a hundred million different runs, two share a hash with a probability of one in four thousand.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.examples import ARRAYS, array_file, blocks_of
from finetune_trainer.data.writing import opened

Hashes = npt.NDArray[np.uint64]
Lengths = npt.NDArray[np.int64]
AT_ONCE = 1 << 17
"""Tokens that are worked on at a time: their hashes stay in the processor's cache."""
_VOCABULARY = 1 << 18
"""Tokens whose mixed values are looked up: 2 MiB."""
_BASE = 0x9E3779B97F4A7C15
_FIRST_MIX, _SECOND_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def token_parts(folder: Path, split: str, group: int = 1, most: int | None = None) -> Iterator[tuple[int, npt.NDArray[np.int32], Lengths]]:
    """A split that is written, AT_ONCE tokens at a time: the index of the first example, tokens [T], lengths [N].

    Examples of a group stay together. With `most`, parts that have so many tokens in all, from everywhere in the split.
    """
    bounds = np.load(folder / array_file(split, "offsets"), mmap_mode="r", allow_pickle=False)
    of_groups = bounds[::group]
    skipped = 1 if most is None else max(1, int(bounds[-1]) // most)
    with opened(folder, split, "tokens") as (tokens, _):
        for number, block in enumerate(blocks_of(of_groups, AT_ONCE)):
            lengths = np.diff(bounds[block.start * group : block.stop * group + 1])
            if number % skipped:
                tokens.seek(int(lengths.sum()) * np.dtype(ARRAYS["tokens"]).itemsize, os.SEEK_CUR)
            else:
                yield block.start * group, np.fromfile(tokens, ARRAYS["tokens"], int(lengths.sum())), lengths


def prefix_sums(tokens: npt.NDArray[np.int32]) -> Hashes:
    """uint64 [T + 1]: what the hashes of all runs in so many tokens [T] follow from."""
    largest = int(tokens.max(initial=0))
    mixed = _mixed_up_to(1 << largest.bit_length())[tokens] if largest < _VOCABULARY else _mixed(tokens)
    mixed *= _powers(len(tokens))[0][: len(tokens)]
    sums = np.empty(len(tokens) + 1, np.uint64)
    sums[0] = 0
    np.cumsum(mixed, out=sums[1:])
    return sums


def _mixed(tokens: npt.NDArray[np.int32]) -> Hashes:
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _FIRST_MIX
    mixed ^= mixed >> np.uint64(29)
    mixed *= _SECOND_MIX
    return mixed


@lru_cache(maxsize=18)
def _mixed_up_to(size: int) -> Hashes:
    """Of each token of a vocabulary whose size is a power of two."""
    return _mixed(np.arange(size, dtype=np.int32))


def runs_of(sums: Hashes, length: int) -> Hashes:
    """The hashes of all runs of so many tokens: uint64 [T + 1 - length], by their first token; none where there are fewer tokens."""
    count = max(0, len(sums) - length)
    found = sums[length:] - sums[:count]
    found *= _powers(count)[1][:count]
    return found


def whole_examples(sums: Hashes, lengths: Lengths, group: int = 1) -> Hashes:
    """The hash of each example, or of as many together as form a group: uint64 [N / group]."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    each = (sums[ends] - sums[starts]) * _powers(len(sums))[1][starts]
    whole: Hashes = each[::group].copy()
    for place in range(1, group):
        whole = whole * _FIRST_MIX + each[place::group]
    return whole


def inside(positions: npt.NDArray[np.int64], length: int, ends: Lengths) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Of runs that begin at these positions: the example [P] of each, and whether the run ends in the same one; `ends` [N] is theirs."""
    owners = np.searchsorted(ends, positions, side="right")
    return owners, positions + length <= ends[owners]


def _powers(count: int) -> tuple[Hashes, Hashes]:
    """The powers of the base from 0 on, and of its inverse, at least so many."""
    return _tables(max(AT_ONCE + 1, 1 << count.bit_length()))


@lru_cache(maxsize=2)
def _tables(size: int) -> tuple[Hashes, Hashes]:
    def powers(base: int) -> Hashes:
        factors = np.full(size, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors, dtype=np.uint64)

    return powers(_BASE), powers(pow(_BASE, -1, 1 << 64))
