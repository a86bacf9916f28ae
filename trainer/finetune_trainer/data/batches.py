"""Which examples a step is taken on: pure functions of the examples' lengths, the spec and the step.

A row is what counts as one sequence of globalBatchSize: with packing, examples that together fill maxSequenceLength; without, one example.
Rows are made once; each epoch goes through them in an order that follows from (seed, epoch). So the total of steps is known before the
first, every step can be computed without the ones before it, and a run that was interrupted, or goes on with another number of workers,
sees the same global batches.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from finetune_api.v1alpha1 import Training
from finetune_trainer.data.examples import Examples

Row = tuple[int, ...]
"""Indices of the examples that share a row; they do not see each other."""


@dataclass(frozen=True)
class Batch:
    """What one optimiser step is taken on, over all workers."""

    rows: tuple[Row, ...]
    tokens: int
    """Tokens in all rows."""
    labels: int
    """Tokens that the loss is taken over, in all rows: the denominator of a mean over labels."""
    groups: int
    """Examples, or pairs of them: the denominator of a mean over those."""


@dataclass(frozen=True)
class BatchPlan:
    """All batches of a training: `plan.batch(step)` for step in range(plan.total_steps)."""

    rows: tuple[Row, ...]
    row_tokens: npt.NDArray[np.int64]
    """Tokens of each row."""
    row_labels: npt.NDArray[np.int64]
    """Tokens of each row that the loss is taken over."""
    row_groups: npt.NDArray[np.int64]
    """Examples, or pairs, in each row."""
    batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps that go through all rows once; the last one may be smaller."""
        return -(-len(self.rows) // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.epochs * self.steps_per_epoch

    def epoch(self, steps_done: int) -> float:
        """Epochs that these steps come to."""
        return steps_done / self.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """The global batch of a step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.rows))
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        return Batch(
            rows=tuple(self.rows[row] for row in chosen),
            tokens=int(self.row_tokens[chosen].sum()),
            labels=int(self.row_labels[chosen].sum()),
            groups=int(self.row_groups[chosen].sum()),
        )


def plan_batches(examples: Examples, training: Training) -> BatchPlan:
    """The batches of a training on these examples."""
    rows = rows_of(examples, training)
    lengths, labels = examples.lengths(), examples.label_counts()
    return BatchPlan(
        rows=rows,
        row_tokens=np.array([lengths[list(row)].sum() for row in rows], dtype=np.int64),
        row_labels=np.array([labels[list(row)].sum() for row in rows], dtype=np.int64),
        row_groups=np.array([len(row) // examples.group for row in rows], dtype=np.int64),
        batch_size=training.global_batch_size,
        epochs=training.epochs,
        seed=training.seed,
    )


def rows_of(examples: Examples, training: Training) -> tuple[Row, ...]:
    """The rows of these examples, packed or not, as the training asks. What belongs together stays in one row."""
    group = examples.group
    units: Sequence[Row] = tuple((unit,) for unit in range(examples.groups))
    if training.packing:
        units = pack(examples.lengths().reshape(-1, group).sum(axis=1), training.max_sequence_length)
    if group == 1:
        return tuple(units)
    return tuple(tuple(unit * group + each for unit in row for each in range(group)) for row in units)


def pack(lengths: npt.NDArray[np.int64], capacity: int) -> tuple[Row, ...]:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room.

    Deterministic. An example longer than the capacity gets a row of its own.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> rows that have just so much
    rooms: list[int] = []  # the keys of with_room, ascending
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(int(example))
        if (left := room - length) > 0:
            if left not in with_room:
                bisect.insort(rooms, left)
            with_room.setdefault(left, []).append(row)
    return tuple(tuple(row) for row in rows)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
    """The order of the rows in an epoch. Philox is specified, so the order is the same on every machine."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def rank_share(rows: Sequence[Row], lengths: npt.NDArray[np.int64], rank: int, world: int) -> tuple[Row, ...]:
    """The rows that one of `world` workers takes, so that all get nearly the same number of tokens.

    The longest row first, each to the worker with the fewest tokens. May be empty where there are fewer rows than workers.
    """
    loads, shares = [0] * world, [[] for _ in range(world)]  # type: tuple[list[int], list[list[Row]]]
    sizes = [_tokens(row, lengths) for row in rows]
    for index in sorted(range(len(rows)), key=lambda index: (-sizes[index], index)):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[index]
        shares[lightest].append(rows[index])
    return tuple(shares[rank])


def micro_batches(
    rows: Sequence[Row],
    lengths: npt.NDArray[np.int64],
    size: int | Literal["auto"],
    auto_tokens: int,
    *,
    padded: bool = False,
) -> Iterator[tuple[Row, ...]]:
    """Split rows into groups that are held in memory at once: `size` rows, or with auto as many as take `auto_tokens` positions.

    `padded` says that each example is a line as long as the longest of its group.
    """
    group: list[Row] = []
    examples = tokens = longest = 0
    for row in rows:
        more, further, length = len(row), _tokens(row, lengths), max(int(lengths[example]) for example in row)
        taken = (examples + more) * max(longest, length) if padded else tokens + further
        if group and (taken > auto_tokens if size == "auto" else len(group) == size):
            yield tuple(group)
            group, examples, tokens, longest = [], 0, 0, 0
        group.append(row)
        examples, tokens, longest = examples + more, tokens + further, max(longest, length)
    if group:
        yield tuple(group)


def positions(rows: Sequence[Row], lengths: npt.NDArray[np.int64], *, padded: bool = False) -> int:
    """Positions that rows take where they are computed at once: their tokens, and the padding if there is any."""
    every = [int(lengths[example]) for row in rows for example in row]
    return len(every) * max(every) if padded else sum(every)


def _tokens(row: Row, lengths: npt.NDArray[np.int64]) -> int:
    return int(sum(lengths[example] for example in row))
