"""The rows of a split on their way to its files: read as examples, checked, cut into tokens, written.

What cannot be used is left out and told of by file and line; how much of that is too much stands in the job.
"""

import hashlib
import json
import logging
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.data.cases import Case, CaseWriter, case_of
from finetune_trainer.data.encoding import Encoded, Encoder
from finetune_trainer.data.formats import NEEDED, Example, Format, Preference, detect_format, example_from
from finetune_trainer.data.inputs import Input
from finetune_trainer.data.left_out import LeftOut, Places
from finetune_trainer.data.rows import Fault, Row
from finetune_trainer.data.writing import SplitWriter
from finetune_trainer.errors import JobError

SHOWN_FAULTS = 5
"""Faulty rows that a message describes; the rest is counted."""

SHOWN_SAMPLES, SAMPLE_CHARACTERS = 3, 400
"""Made examples that the status shows, and how much of prompt and answer."""
_ROUNDING = 1e-6
"""29 of 100 rows are a share of 0.29, though 0.29 * 100 is a little less."""

log = logging.getLogger(__name__)
_Item = TypeVar("_Item")


class Answering(Protocol):
    """Whoever gives examples other answers: one example, or fault, for each."""

    def taught(self, examples: Iterable[Example | Fault]) -> Iterator[Example | Fault]:
        """The examples with its answers, in their order."""
        ...


@dataclass(frozen=True)
class Source:
    """Rows that go to a split."""

    field: str
    """The job's field that they come from, for messages."""
    input: Input
    teacher: Answering | None = None
    kind: Literal["rows", "made", "suite"] = "rows"
    """As the job's data is, as the preparation makes them (which lack data.groupBy), or a suite's, which may have another format."""
    limit: int | None = None
    """Rows that are read at most, the first."""


@dataclass
class Kept:
    """What of a split was written."""

    places: Places = field(default_factory=Places)
    """Of each group."""
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    """What each group has in data.groupBy, as a hash; empty where rows do not belong together."""
    rejected: int = 0
    """Rows that were left out."""
    made: range = range(0)
    """Groups that the preparation made."""
    samples: list[str] = field(default_factory=list)
    """The first of these, for people."""


@dataclass(frozen=True)
class Reading:
    """How rows become examples, the same for all splits of a job."""

    folder: Path
    job: FineTuneJob
    encoder: Encoder
    longest: int | None
    """Tokens of the longest example that the model takes."""
    left_out: LeftOut

    def write(self, split: str, sources: Sequence[Source], group: int, *, cases: bool) -> Kept:
        """Write all that can be learnt from, one source after the other; with `cases` also how each example is asked.

        Raises OSError, and JobError (DatasetInvalid, InvalidSpec, ...) where more cannot be used than the job allows.
        """
        kept = Kept()
        with SplitWriter(self.folder, split) as writer, CaseWriter(self.folder, split, wanted=cases) as asked:
            for source in sources:
                before = len(kept.places)
                self._write(source, group, kept, writer, asked)
                if source.kind == "made":
                    kept.made = range(before, len(kept.places))
        return kept

    def _write(self, source: Source, group: int, kept: Kept, writer: SplitWriter, asked: CaseWriter) -> None:
        """Write one source's."""
        most = self.job.spec.data.preparation.max_rejected_fraction
        seen = _Seen(source.field, self.left_out)
        is_made = source.kind == "made"
        for key, example, item in self._groups(source, group, with_examples=asked.wanted or is_made):
            if isinstance(item, Fault):
                seen.fault(item)
                continue
            without = next((one for one in item if not one.has_labels()), None)
            if without is not None:
                seen.reject(without)
                continue
            seen.kept += 1
            kept.places.add(item[0].place)
            if key is not None:
                kept.keys.append(key)
            for one in item:
                seen.measure(one, self.longest)
                if not seen.faulty or most:
                    writer.add(one.tokens, one.labelled)
            if isinstance(example, Example):
                case = case_of(example, "")
                asked.add(case)
                kept.samples += [_sample(case)] if is_made and len(kept.samples) < SHOWN_SAMPLES else []
        seen.check(self.longest, self.job.spec.training.max_sequence_length, most)
        kept.rejected += seen.rejected + seen.faulty

    def _groups(
        self, source: Source, group: int, *, with_examples: bool
    ) -> Iterator[tuple[int | None, Example | Fault | None, tuple[Encoded, ...] | Fault]]:
        """Each row's key (of data.groupBy), example and tokens, or what is wrong with it: every step makes one of one, in order."""
        keys: deque[int | None] = deque()
        examples: deque[Example | Fault] = deque()
        column = self.job.spec.data.group_by if source.kind != "suite" else None
        rows = _first(source.input.rows(), source.limit)
        keyed = _keyed(rows, column, keys, made=source.kind == "made")
        read = examples_of(keyed, self.job, of_suite=source.kind == "suite")
        taught = read if source.teacher is None else source.teacher.taught(read)
        seen = _noted(taught, examples) if with_examples else taught
        for item in _grouped(self.encoder.encode(seen), group):
            yield keys.popleft(), examples.popleft() if with_examples else None, item


@dataclass
class _Seen:
    """What there is to say of a source's rows."""

    name: str
    left_out: LeftOut
    kept: int = 0
    rejected: int = 0
    first_rejected: Encoded | None = None
    faulty: int = 0
    faults: list[Fault] = field(default_factory=list)
    """The first of them."""
    over: int = 0
    first_over: Encoded | None = None
    """Longer than the model takes."""

    def fault(self, fault: Fault) -> None:
        """One more row that cannot be used."""
        if not fault.counts:
            self.left_out.add(self.name, fault.place, fault.problem)
            return
        self.faulty += 1
        self.faults += [fault] if len(self.faults) < SHOWN_FAULTS else []
        self.left_out.add(self.name, fault.place, fault.problem)

    def reject(self, one: Encoded) -> None:
        """One more row with nothing to learn."""
        self.rejected += 1
        self.first_rejected = self.first_rejected or one
        self.left_out.add(self.name, one.place, f"no label is within maxSequenceLength; the example has {one.full_length} tokens")

    def measure(self, one: Encoded, longest: int | None) -> None:
        """Note what is too long for the model."""
        if longest is not None and len(one.tokens) > longest:
            self.over += 1
            self.first_over = self.first_over or one

    def check(self, longest: int | None, max_length: int, most: float) -> None:
        """Raise JobError where the source cannot be used, naming the field, the rows and what is wrong with them.

        `most` is the share of rows that may be unusable.
        """
        rows = self.kept + self.rejected + self.faulty
        if self.faults and (self.faulty > most * rows + _ROUNDING or self.faulty == rows):
            raise JobError(Reason.DATASET_INVALID, _faults_message(self.name, self.faults, self.faulty, most, rows))
        if self.first_over is not None:
            raise JobError(
                Reason.INVALID_SPEC,
                f"{self.name}: {self.first_over.place} has {self.first_over.full_length} tokens and the model takes {longest}: "
                f"set training.maxSequenceLength to at most {longest}, which cuts {self.over} examples",
            )
        if self.first_rejected is None:
            return
        message = "%s: %d examples hold no label within maxSequenceLength and are left out, like %s"
        log.warning(message, self.name, self.rejected, self.first_rejected.place)
        if not self.kept:
            raise JobError(
                Reason.DATASET_INVALID,
                f"{self.name}: {self.first_rejected.place}: no token that counts in the loss is within training.maxSequenceLength "
                f"({max_length}; the example has {self.first_rejected.full_length}), and so in all {self.rejected} rows",
            )


def cases_of(source: Source, job: FineTuneJob, left_out: LeftOut) -> tuple[Case, ...]:
    """A suite's cases without tokens, for whoever has a tokenizer of his own; of a source with a limit the last so many.

    Raises JobError (DatasetInvalid, ...) where there is none, or more cannot be used than the job allows.
    """
    seen, kept = _Seen(source.field, left_out), deque[Case](maxlen=source.limit)
    for example in examples_of(source.input.rows(), job, of_suite=True):
        if isinstance(example, Fault):
            seen.fault(example)
            continue
        kept.append(case_of(example, f"{seen.kept:06d}"))
        seen.kept += 1
    seen.check(None, job.spec.training.max_sequence_length, job.spec.data.preparation.max_rejected_fraction)
    if not kept:
        raise JobError(Reason.DATASET_INVALID, f"{source.field}: there is no example to measure on")
    return tuple(kept)


def examples_of(rows: Iterable[Row | Fault], job: FineTuneJob, *, of_suite: bool = False) -> Iterator[Example | Fault]:
    """Rows as examples; with format auto the first row decides for all.

    A suite's rows may have another format and other columns than the job's data; of preferences it takes the better answer.
    """
    columns = {str(name): column for name, column in job.spec.data.columns.items()}
    given: Format | None = None if job.spec.data.format == "auto" else job.spec.data.format
    found: tuple[Format, Mapping[str, str]] | None = None if given is None or of_suite else (given, columns)
    for row in rows:
        if isinstance(row, Fault):
            yield row
            continue
        if found is None:
            detected = _detected(row, job, columns, of_suite=of_suite)
            if isinstance(detected, Fault):
                yield detected
                continue
            found = detected
        example = example_from(row, *found)
        yield example.chosen if of_suite and isinstance(example, Preference) else example


def _detected(row: Row, job: FineTuneJob, columns: Mapping[str, str], *, of_suite: bool) -> tuple[Format, Mapping[str, str]] | Fault:
    """The format of a row, and its columns by field."""
    preferences = job.spec.objective.dpo is not None
    given = job.spec.data.format
    if of_suite and given != "auto" and all(columns.get(name, name) in row.columns for name in NEEDED[given]):
        return given, columns
    ways: list[tuple[Mapping[str, str], bool]] = [(columns, preferences)]
    ways += [(columns, False), (columns, True), ({}, False), ({}, True)] if of_suite else []
    found = [(detect_format(row, names, preferences=of_pairs), names) for names, of_pairs in ways]
    fitting = [(format_, names) for format_, names in found if not isinstance(format_, Fault)]
    return fitting[0] if fitting else cast("Fault", found[0][0])


def _first(rows: Iterator[Row | Fault], limit: int | None) -> Iterator[Row | Fault]:
    """The first of the rows."""
    for number, row in enumerate(rows):
        if number == limit:
            return
        yield row


def _keyed(rows: Iterator[Row | Fault], column: str | None, keys: "deque[int | None]", *, made: bool) -> Iterator[Row | Fault]:
    """The rows, and beside each what it has in data.groupBy; a row that was made and has nothing there is a group of its own."""
    for number, row in enumerate(rows):
        value = row.columns.get(column) if column is not None and isinstance(row, Row) else None
        if column is None or isinstance(row, Fault):
            keys.append(None)
        elif value is not None or made:
            keys.append(_hash(value if value is not None else ["made", number]))
        else:
            keys.append(None)
            yield Fault(row.place, f"the column {column}, by which data.groupBy keeps rows together, is missing or null")
            continue
        yield row


def _sample(case: Case) -> str:
    """A made example as people are shown it."""
    prompt = case.prompt if case.prompt is not None else str(case.messages[-1].get("content") or "")
    return f"{prompt[:SAMPLE_CHARACTERS]} -> {case.reference[:SAMPLE_CHARACTERS]}"


def _hash(value: object) -> int:
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _noted(items: Iterable[_Item], noted: "deque[_Item]") -> Iterator[_Item]:
    """The same, each remembered."""
    for item in items:
        noted.append(item)
        yield item


def _grouped(encoded: Iterator[Encoded | Fault], group: int) -> Iterator[tuple[Encoded, ...] | Fault]:
    """Documents that belong together, which are encoded one after the other; a fault stands for all of its group."""
    members: list[Encoded] = []
    for item in encoded:
        if isinstance(item, Fault):
            yield item
            continue
        members.append(item)
        if len(members) == group:
            yield tuple(members)
            members = []


def _faults_message(name: str, faults: Sequence[Fault], number: int, most: float, rows: int) -> str:
    """What is wrong with the first of so many rows; rows of a file that have the same fault are told together."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for fault in faults:
        alike.setdefault((fault.place.file, fault.place.unit, fault.problem), []).append(str(fault.place.number))
    told = [
        f"{file}, {unit}{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}: {problem}"
        for (file, unit, problem), numbers in alike.items()
    ]
    more = f"; and {number - len(faults)} more such rows" if number > len(faults) else ""
    of_all = f" of {rows:,} rows (data.preparation.maxRejectedFraction is {most:g})" if most else f" {'row' if number == 1 else 'rows'}"
    return f"{name}: {number}{of_all} cannot be used. " + "; ".join(told) + more


def keys_of(kept: Kept) -> npt.NDArray[np.uint64] | None:
    """What the groups have in data.groupBy: uint64 [groups], or None where they do not belong together."""
    return np.frombuffer(kept.keys, np.uint64) if len(kept.keys) else None
