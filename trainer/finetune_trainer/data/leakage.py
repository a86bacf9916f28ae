"""Which training examples hold what is held out: by the runs of tokens that they have in common.

A training example leaks where it holds at least SHARE of the runs of RUN tokens of one held-out example (the measure and its numbers are
those of Chowdhery et al. 2022, PaLM, section 8; taken example by example), or is the same as one. Runs that stand in more than COMMON
examples are a template, a system prompt or an answer that many questions have, and say nothing (as in Brown et al. 2020, appendix C).

The held-out examples are known by a sketch: of each, the runs with the smallest hashes, at most SKETCH; so of an example with more the
share is an estimate, whose standard error is 8 percent. What is in memory is some 20 bytes for a run of the sketch, at most 640 bytes for
a held-out example and no more than 80 where there are many; of the training data, 8 bytes for an example, and what was found.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.runs import Hashes, inside, prefix_sums, runs_of, token_parts, whole_examples

RUN = 8
"""Tokens of a run."""
SHARE = 0.7
"""Share of a held-out example's runs above which it counts as known."""
COMMON = 10
"""Examples in which a run may stand without being common."""
SKETCH = 32
_LEAST, _MOST = 4, 1 << 21
"""Runs of an example that are kept where there are many, and runs in all unless that takes more."""
_SAMPLED = 1 << 20
"""Tokens of each split in which common runs are looked for before the sketch is drawn, so that it holds few of them."""
_COUNTERS = 21
"""Bits of a hash that choose its counter."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Some:
    """Groups of a split that is written."""

    split: str
    chosen: npt.NDArray[np.bool_]
    """Which of them: [groups]."""
    group: int = 1
    """Examples that belong together."""


@dataclass(frozen=True)
class Leak:
    """One training example that holds a held-out one."""

    example: int
    """Group of the training split."""
    split: int
    """Which of the held-out splits, by its place."""
    held: int
    """Group of that split."""


def leaks(folder: Path, train: Some, held: Sequence[Some]) -> list[Leak]:
    """The training examples that hold a held-out one, in their order, with one that each holds. Raises OSError."""
    counts = [int(some.chosen.sum()) for some in held]
    if not sum(counts):
        return []
    common = _common_runs(folder, {train.split, *(some.split for some in held)})
    size = max(_LEAST, min(SKETCH, _MOST // sum(counts)))
    sketch = _Sketch.of([_sketched(folder, some, size, common) for some in held])
    pairs = sketch.found(_hits(folder, train, sketch))
    places = [np.flatnonzero(some.chosen) for some in held]
    firsts = np.cumsum([0, *counts])
    made = []
    for example, number in pairs:
        split = int(np.searchsorted(firsts, number, side="right")) - 1
        made.append(Leak(example, split, int(places[split][number - firsts[split]])))
    return made


def _common_runs(folder: Path, splits: Iterable[str]) -> npt.NDArray[np.bool_]:
    """Whether runs with these first bits of their hash are common, by a sample: bool [2**_COUNTERS]."""
    common = np.zeros(1 << _COUNTERS, np.bool_)
    for split in sorted(splits):
        counts = np.zeros(1 << _COUNTERS, np.uint32)
        for _, tokens, _ in token_parts(folder, split, most=_SAMPLED):
            np.add.at(counts, _first_bits(runs_of(prefix_sums(tokens), RUN), _COUNTERS), np.uint32(1))
        common |= counts > COMMON
    return common


def _first_bits(hashes: Hashes, bits: int) -> Indices:
    return (hashes >> np.uint64(64 - bits)).view(np.int64)


def _sketched(folder: Path, some: Some, size: int, common: npt.NDArray[np.bool_]) -> tuple[Hashes, Indices, Hashes]:
    """The sketch of some groups: hashes of runs [R] and the group, counted among the chosen, that each is of [R]; whole groups [G]."""
    runs, owners, wholes = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    numbers = np.cumsum(some.chosen) - 1
    for first, tokens, lengths in token_parts(folder, some.split, some.group):
        groups = np.arange(first, first + len(lengths)) // some.group
        chosen = some.chosen[groups]
        taken = lengths[chosen]
        if not len(taken):
            continue
        sums = prefix_sums(tokens[np.repeat(chosen, lengths)])
        found = runs_of(sums, RUN)
        positions = np.flatnonzero(~common[_first_bits(found, _COUNTERS)])
        documents, whole = inside(positions, RUN, np.cumsum(taken))
        kept, owner = _smallest(found[positions[whole]], numbers[groups[chosen]][documents[whole]], size)
        runs.append(kept)
        owners.append(owner)
        wholes.append(whole_examples(sums, taken, some.group))
    return np.concatenate(runs), np.concatenate(owners), np.concatenate(wholes)


def _smallest(hashes: Hashes, owners: Indices, size: int) -> tuple[Hashes, Indices]:
    """Of each owner the smallest hashes, each once. The owners are in their order."""
    counts = np.bincount(owners, minlength=1)
    # The hashes are spread evenly, so that of a long example most need not be sorted: as many as are wanted are far below this.
    below = (hashes >> np.uint64(32)).astype(np.int64) * counts[owners] <= (2 * size + 32) << 32
    hashes, owners = hashes[below], owners[below]
    order = np.lexsort((hashes, owners))
    hashes, owners = hashes[order], owners[order]
    new = np.ones(len(hashes), np.bool_)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    hashes, owners = hashes[new], owners[new]
    firsts = np.searchsorted(owners, owners)  # sorted, so this is where the owner's begin
    kept = np.arange(len(owners)) - firsts < size
    return hashes[kept], owners[kept]


@dataclass(frozen=True)
class _Sketch:
    """What is looked for."""

    runs: Hashes
    """[R], sorted, each once."""
    starts: Indices
    """[R + 1]: run i is of owners[starts[i]:starts[i + 1]]."""
    owners: Indices
    wholes: Hashes
    """Of each held-out group [H]."""
    filter: npt.NDArray[np.bool_]
    """By the first bits of a hash, whether it may be one of the runs: what is looked up stays in the processor's cache."""

    @classmethod
    def of(cls, parts: Sequence[tuple[Hashes, Indices, Hashes]]) -> "_Sketch":
        """The sketch of several splits, whose groups are counted on."""
        firsts = np.cumsum([0, *(len(wholes) for _, _, wholes in parts)])
        hashes = np.concatenate([runs for runs, _, _ in parts])
        owners = np.concatenate([owner + first for (_, owner, _), first in zip(parts, firsts, strict=False)])
        order = np.argsort(hashes, kind="stable")
        runs, starts = np.unique(hashes[order], return_index=True)
        bits = min(24, max(16, (8 * len(runs)).bit_length()))
        may_be = np.zeros(1 << bits, np.bool_)
        may_be[_first_bits(runs, bits)] = True
        return cls(runs, np.append(starts, len(hashes)), owners[order], np.concatenate([wholes for _, _, wholes in parts]), may_be)

    def among(self, hashes: Hashes) -> tuple[Indices, Indices]:
        """Positions of the hashes that are runs of the sketch, and which runs."""
        bits = len(self.filter).bit_length() - 1
        positions = np.flatnonzero(self.filter[_first_bits(hashes, bits)])
        return _places_in(self.runs, hashes[positions], positions)

    def found(self, hits: "_Hits") -> Iterator[tuple[int, int]]:
        """Training example and held-out example, by their numbers: of each training example the first that it holds."""
        counted = (hits.counts <= COMMON) & (np.diff(self.starts) <= COMMON)
        each = np.diff(self.starts)
        wanted = np.bincount(self.owners[np.repeat(counted, each)], minlength=len(self.wholes))
        kept = counted[hits.runs]
        examples, runs = hits.examples[kept], hits.runs[kept]
        repeated = each[runs]
        within = np.arange(int(repeated.sum())) - np.repeat(np.cumsum(repeated) - repeated, repeated)
        owners = self.owners[np.repeat(self.starts[runs], repeated) + within]
        pairs, numbers = np.unique(np.repeat(examples, repeated) * len(self.wholes) + owners, return_counts=True)
        example, owner = np.divmod(pairs, len(self.wholes))
        holds = numbers >= SHARE * wanted[owner]
        same = np.stack([hits.same_examples, hits.same_held], axis=1)
        everything = np.concatenate([same, np.stack([example[holds], owner[holds]], axis=1)])
        _, firsts = np.unique(everything[:, 0], return_index=True)
        yield from ((int(one), int(other)) for one, other in everything[firsts])


@dataclass(frozen=True)
class _Hits:
    """Where the training data holds runs of the sketch."""

    examples: Indices
    """[K]: groups, each with..."""
    runs: Indices
    """[K]: ...a run that it holds; those of runs that are not common, and each pair once."""
    counts: Indices
    """[R]: examples that hold each run."""
    same_examples: Indices
    """[S]: groups that are the same as..."""
    same_held: Indices
    """[S]: ...a held-out one."""


def _hits(folder: Path, train: Some, sketch: _Sketch) -> _Hits:
    """Go through the training data once."""
    counts = np.zeros(len(sketch.runs), np.int64)
    pairs = np.empty((0, 2), np.int64)
    fresh, waiting, same = [pairs], 0, [pairs]
    order = np.argsort(sketch.wholes, kind="stable")
    for first, tokens, lengths in token_parts(folder, train.split, train.group):
        groups = np.arange(first, first + len(lengths)) // train.group
        sums = prefix_sums(tokens)
        positions, runs = sketch.among(runs_of(sums, RUN))
        documents, whole = inside(positions, RUN, np.cumsum(lengths))
        found = np.stack([groups[documents], runs], axis=1)[whole & train.chosen[groups[documents]]]
        found = np.unique(found, axis=0) if len(found) else found
        counts += np.bincount(found[:, 1], minlength=len(counts)) if len(found) else 0
        fresh.append(found)
        waiting += len(found)
        if waiting > _MOST:
            pairs, fresh, waiting = _uncommon([pairs, *fresh], counts), [], 0
        whole_groups = whole_examples(sums, lengths, train.group)
        at, which = _places_in(sketch.wholes[order], whole_groups, groups[:: train.group])
        same.append(np.stack([at, order[which]], axis=1)[train.chosen[at]])
    pairs, equal = _uncommon([pairs, *fresh], counts), np.concatenate(same)
    return _Hits(pairs[:, 0], pairs[:, 1], counts, equal[:, 0], equal[:, 1])


def _uncommon(pairs: Sequence[npt.NDArray[np.int64]], counts: Indices) -> npt.NDArray[np.int64]:
    """The pairs of group and run without those of runs that are common by now."""
    whole = np.concatenate(pairs)
    return whole[counts[whole[:, 1]] <= COMMON]


def _places_in(values: Hashes, wanted: Hashes, names: Indices) -> tuple[Indices, Indices]:
    """The names of those wanted that stand among sorted values, and where the first of each does."""
    if not len(values):
        return names[:0], names[:0]
    places = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    found = values[places] == wanted
    return names[found], places[found]
