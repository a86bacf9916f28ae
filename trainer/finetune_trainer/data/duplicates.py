"""Examples that are there already: the same tokens, or almost the same.

Near duplicates have NEAR or more of their shingles (runs of SHINGLE tokens) in common, by Jaccard. They are looked for among those that
agree in a band of their MinHash signatures (Broder 1997; on bands Leskovec et al., Mining of Massive Datasets, section 3.4) and are then
compared themselves, so none is left out wrongly, and of those that are just at NEAR one in twenty is overlooked.

In memory are 16 bytes for an example, with near duplicates 8 more for each band: some 150 bytes.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.examples import ARRAYS, Examples, array_file
from finetune_trainer.data.runs import Hashes, prefix_sums, runs_of, token_parts, whole_examples

if TYPE_CHECKING:
    from datasketch import MinHash

NEAR = 0.8
SHINGLE = 5
"""Tokens of a shingle."""
PERMUTATIONS = 128
"""Values of a signature: its estimate of the Jaccard similarity has a standard error of 0.035 at NEAR."""
_WEIGHTS = (0.05, 0.95)
"""How bad it is to compare two in vain, and to overlook two: 16 bands of 8 values."""
_KNOWN = 64
"""Examples whose shingles are kept: where many are alike it is the same few that they are compared with."""

Indices = npt.NDArray[np.int64]


def duplicates(folder: Path, split: str, kind: Literal["exact", "near"], group: int = 1) -> Indices:
    """Of each group the earlier one that it repeats, which is itself kept, or -1: int64 [groups]. Raises OSError."""
    tokens, labelled, offsets = (np.load(folder / array_file(split, part), mmap_mode="r", allow_pickle=False) for part in ARRAYS)
    examples = Examples(tokens, labelled, offsets, group)
    repeats = _exact(folder, split, examples)
    if kind == "near":
        _add_near(examples, repeats)
    return repeats


def _exact(folder: Path, split: str, examples: Examples) -> Indices:
    parts = token_parts(folder, split, examples.group)
    hashes = np.concatenate(
        [np.empty(0, np.uint64), *(whole_examples(prefix_sums(tokens), lengths, examples.group) for _, tokens, lengths in parts)]
    )
    repeats = np.full(len(hashes), -1, np.int64)
    firsts = _first_of_its_kind(hashes)
    for index in np.flatnonzero(firsts != np.arange(len(firsts))).tolist():
        if all(np.array_equal(*pair) for pair in zip(_tokens(examples, index), _tokens(examples, int(firsts[index])), strict=True)):
            repeats[index] = firsts[index]
    return repeats


def _first_of_its_kind(values: Hashes) -> Indices:
    """The place of the first value that each is equal to: int64 [N]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.ones(len(values), np.bool_)
    begins[1:] = ordered[1:] != ordered[:-1]
    firsts = np.empty(len(values), np.int64)
    firsts[order] = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    return firsts


def _add_near(examples: Examples, repeats: Indices) -> None:
    """Mark those that nearly repeat one that is kept: of each band the first one that agrees is looked at."""
    known = lru_cache(maxsize=_KNOWN)(partial(shingles, examples))
    firsts = _bands(examples)
    for band in range(firsts.shape[1]):
        firsts[:, band] = _first_of_its_kind(firsts[:, band]).view(np.uint64)
    for index in np.flatnonzero((firsts < np.arange(len(firsts), dtype=np.uint64)[:, None]).any(axis=1)).tolist():
        if repeats[index] >= 0:
            continue
        earlier = {int(first) for first in firsts[index] if first < index}
        kept = sorted({int(repeats[first]) if repeats[first] >= 0 else first for first in earlier})
        own = shingles(examples, index)
        repeats[index] = next((first for first in kept if jaccard(own, known(first)) >= NEAR), -1)


def _bands(examples: Examples) -> Hashes:
    """A hash of each band of each group's signature: uint64 [groups, bands]."""
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS, weights=_WEIGHTS)
    bands = np.empty((examples.groups, lsh.b), np.uint64)
    empty = MinHash(PERMUTATIONS, hashfunc=int)
    for index in range(examples.groups):
        values = signature(shingles(examples, index), empty)[: lsh.b * lsh.r].astype(np.int32).reshape(lsh.b, lsh.r)
        sums = prefix_sums(values.reshape(-1))
        bands[index] = whole_examples(sums, np.full(lsh.b, lsh.r, np.int64))
    return bands


def signature(hashes: Hashes, empty: "MinHash") -> npt.NDArray[np.uint32]:
    """The MinHash signature of a set of hashes: uint32 [PERMUTATIONS]."""
    made = empty.copy()
    made.update_batch((hashes >> np.uint64(32)).tolist())
    signed: npt.NDArray[np.uint32] = made.hashvalues
    return signed


def shingles(examples: Examples, group: int) -> Hashes:
    """The hashes of a group's shingles, each once; an example that is shorter than one counts as one."""
    found = []
    for tokens in _tokens(examples, group):
        sums = prefix_sums(tokens)
        found.append(runs_of(sums, min(SHINGLE, max(1, len(tokens)))))
    return np.unique(np.concatenate(found))


def jaccard(one: Hashes, other: Hashes) -> float:
    """What share two sets, each sorted, have in common of all that they hold."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(1, len(one) + len(other) - common)


def _tokens(examples: Examples, group: int) -> list[npt.NDArray[np.int32]]:
    """The tokens of each of a group's examples."""
    members = range(group * examples.group, (group + 1) * examples.group)
    return [np.asarray(examples.example(member)[0]) for member in members]
