"""All of a job's data, checked, tokenised, split and counted: the head's work, done once.

Row after row goes its whole way to the files of the prepared folder; what is held at a time is some chunks of examples, whatever the size
of the data, but for a few bytes an example while a fraction is held out.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from fsspec.implementations.local import LocalFileSystem

from finetune_api.reasons import Reason
from finetune_api.status import DataSummary
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.data.encoding import Encoded, Encoder, LossOn
from finetune_trainer.data.examples import ARRAYS, SPLITS, Examples, Prepared, array_file, open_prepared
from finetune_trainer.data.formats import Example, Format, detect_format, example_from
from finetune_trainer.data.inputs import Input, input_of
from finetune_trainer.data.rows import Fault, Row
from finetune_trainer.data.writing import SplitWriter, divide, examples_in, tokens_in, write_manifest
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location, Mounts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_FAULTS = 5
"""Faulty rows that a message describes; the rest is counted."""
_HOLD_OUT = 1
"""Stream of random numbers that the held-out fraction is drawn from; the epochs draw from others."""
_UNDIVIDED = "undivided"
"""Split that training data is written to before some is held out; never seen outside."""

log = logging.getLogger(__name__)


def inputs_of(job: FineTuneJob, mounts: Mounts) -> dict[str, Input]:
    """Where the rows of each split come from: train, and validation and test where they have data of their own. Raises JobError."""
    return {split: input_of(source, split, mounts) for split, source in job.spec.data.sources().items()}


def prepare_data(job: FineTuneJob, tokenizer: "PreTrainedTokenizerBase", mounts: Mounts, longest: int | None = None) -> Prepared:
    """As write_data, in a folder that is gone at once, and stays mapped into memory as long as it is used."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), job, inputs_of(job, mounts), tokenizer, longest)
        return open_prepared(Location(LocalFileSystem(), folder, f"file://{folder}"), Path(folder))


class ExampleTeacher(Protocol):
    """A served teacher, whose answers to the prompts of the training data take the place of the data's own."""

    def identity(self) -> dict[str, Any]:
        """What its answers follow from."""
        ...

    def taught(self, examples: Iterable[Example | Fault]) -> Iterator[Example | Fault]:
        """The examples with its answers."""
        ...

    def write(self, folder: Path, train: Examples) -> None:
        """Leave beside the prepared data what else it has said of it."""
        ...


def write_data(
    folder: Path,
    job: FineTuneJob,
    inputs: dict[str, Input],
    tokenizer: "PreTrainedTokenizerBase",
    longest: int | None = None,
    teacher: ExampleTeacher | None = None,
) -> dict[str, Any]:
    """Read, check and tokenise every split into a folder, and hold out the validation fraction.

    `longest` is the longest example that the model takes; `teacher` answers the training data's prompts, what is held out of it too.
    Returns the manifest, which has the counts for the status in `summary`.
    Raises OSError, and JobError (DatasetNotFound, DatasetInvalid, AuthenticationFailed, ...), for bad rows with the first by file, line and
    field and with their number.
    """
    group = 1 if job.spec.objective.dpo is None else 2
    fraction = job.spec.data.validation.fraction
    rejected = 0
    for split, source in inputs.items():
        target = _UNDIVIDED if split == "train" and fraction is not None else split
        encoder = Encoder(tokenizer, loss_on(job), job.spec.training.max_sequence_length)
        examples = examples_of(source.rows(), job)
        encoded = encoder.encode(examples if teacher is None or split != "train" else teacher.taught(examples))
        rejected += _write_split(folder, target, f"data.{split}", _grouped(encoded, group), job, longest)
    if fraction is not None:
        held = _held_out(examples_in(folder, _UNDIVIDED) // group, fraction, job.spec.training.seed)
        divide(folder, _UNDIVIDED, np.repeat(held, group), rest="train", taken="validation")

    if teacher is not None:
        teacher.write(folder, Examples(*(np.load(folder / array_file("train", part), mmap_mode="r") for part in ARRAYS)))
    splits = [split for split in SPLITS if split in inputs or (split == "validation" and fraction is not None)]
    counts = {split: examples_in(folder, split) // group for split in splits}
    summary = DataSummary(
        train=counts["train"],
        validation=counts["validation"],
        test=counts.get("test", 0),
        tokens=tokens_in(folder, "train"),
        rejected=rejected,
    )
    return write_manifest(folder, splits, group, {"rejected": rejected, "summary": summary.to_json()})


def loss_on(job: FineTuneJob) -> LossOn:
    """Which tokens are labels. Of preferences it is the answers."""
    objective = job.spec.objective
    labelled = objective.sft or objective.distillation
    return labelled.loss_on if labelled is not None else "completion"


@dataclass
class _Seen:
    """What there is to say of a split's rows."""

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
        self.faulty += 1
        self.faults += [fault] if len(self.faults) < SHOWN_FAULTS else []

    def check(self, name: str, longest: int | None, max_length: int) -> None:
        """Raise JobError where the split cannot be used, naming the field, the rows and what is wrong with them."""
        if self.faults:
            raise JobError(Reason.DATASET_INVALID, _faults_message(name, self.faults, self.faulty))
        if self.first_over is not None:
            raise JobError(
                Reason.INVALID_SPEC,
                f"{name}: {self.first_over.place} has {self.first_over.full_length} tokens and the model takes {longest}: "
                f"set training.maxSequenceLength to at most {longest}, which cuts {self.over} examples",
            )
        if self.first_rejected is None:
            return
        message = "%s: %d examples hold no label within maxSequenceLength and are left out, like %s"
        log.warning(message, name, self.rejected, self.first_rejected.place)
        if not self.kept:
            raise JobError(
                Reason.DATASET_INVALID,
                f"{name}: {self.first_rejected.place}: no token that counts in the loss is within training.maxSequenceLength "
                f"({max_length}; the example has {self.first_rejected.full_length}), and so in all {self.rejected} rows",
            )


def _write_split(
    folder: Path, split: str, name: str, groups: Iterator[tuple[Encoded, ...] | Fault], job: FineTuneJob, longest: int | None
) -> int:
    """Write what can be learnt from; `name` is the job's field. Returns how many groups were left out. Raises JobError."""
    seen = _Seen()
    with SplitWriter(folder, split) as writer:
        for group in groups:
            if isinstance(group, Fault):
                seen.fault(group)
                continue
            without = next((item for item in group if not item.has_labels()), None)
            if without is not None:
                seen.rejected += 1
                seen.first_rejected = seen.first_rejected or without
                continue
            seen.kept += 1
            for item in group:
                if longest is not None and len(item.tokens) > longest:
                    seen.over += 1
                    seen.first_over = seen.first_over or item
                if not seen.faults:
                    writer.add(item.tokens, item.labelled)
    seen.check(name, longest, job.spec.training.max_sequence_length)
    return seen.rejected


def examples_of(rows: Iterator[Row | Fault], job: FineTuneJob) -> Iterator[Example | Fault]:
    """Rows as examples; with format auto the first row decides for all."""
    columns = {str(name): column for name, column in job.spec.data.columns.items()}
    format_: Format | None = None if job.spec.data.format == "auto" else job.spec.data.format
    for row in rows:
        if isinstance(row, Fault):
            yield row
            continue
        if format_ is None:
            detected = detect_format(row, columns, preferences=job.spec.objective.dpo is not None)
            if isinstance(detected, Fault):
                yield detected
                continue
            format_ = detected
        yield example_from(row, format_, columns)


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


def _faults_message(name: str, faults: list[Fault], number: int) -> str:
    """What is wrong with the first of so many rows; rows of a file that have the same fault are told together."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for fault in faults:
        alike.setdefault((fault.place.file, fault.place.unit, fault.problem), []).append(str(fault.place.number))
    told = [
        f"{file}, {unit}{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}: {problem}"
        for (file, unit, problem), numbers in alike.items()
    ]
    more = f"; and {number - len(faults)} more such rows" if number > len(faults) else ""
    return f"{name}: {number} {'row' if number == 1 else 'rows'} cannot be used. " + "; ".join(told) + more


def _held_out(count: int, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which of so many groups are held out: bool [count], of either kind at least one, chosen by the seed."""
    if count < 2:
        problem = "data.train: one example is too few to hold some out for validation; set data.validation.source"
        raise JobError(Reason.DATASET_INVALID, problem)
    held = min(max(1, round(count * fraction)), count - 1)
    order = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, _HOLD_OUT])).permutation(count)
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[order[:held]] = True
    return chosen
