"""All of a job's data, checked, tokenised, split and counted: the head's work, done once."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune_api.reasons import Reason
from finetune_api.status import DataSummary
from finetune_api.v1alpha1 import DataSource, FineTuneJob
from finetune_trainer.data.encoding import CHUNK, Encoded, Encoder
from finetune_trainer.data.examples import Examples, Prepared, digest_of, join
from finetune_trainer.data.formats import Example, Format, detect_format, example_from
from finetune_trainer.data.rows import Fault, Row, read_rows
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Mounts, resolve_data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_FAULTS = 5
"""Faulty rows that a message describes; the rest is counted."""
_HOLD_OUT = 1
"""Stream of random numbers that the held-out fraction is drawn from; the epochs draw from others."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Split:
    examples: Examples
    rejected: int


def prepare_data(job: FineTuneJob, tokenizer: "PreTrainedTokenizerBase", mounts: Mounts, longest: int | None = None) -> Prepared:
    """Read, check and tokenise every split; hold out the validation fraction. `longest` is the longest example that the model takes.

    Raises JobError (DatasetNotFound, DatasetInvalid, AuthenticationFailed, ...), for bad rows with the first by file, line and field and
    with their number.
    """
    data = job.spec.data
    train = _read_split("data.train", data.train, job, tokenizer, mounts, longest)
    own = data.validation.data_source()
    if own is not None:
        validation = _read_split("data.validation", own, job, tokenizer, mounts, longest)
    else:
        assert data.validation.fraction is not None  # noqa: S101 - the spec's own rule
        train, validation = _held_out(train, data.validation.fraction, job.spec.training.seed)
    test = _read_split("data.test", data.test, job, tokenizer, mounts, longest) if data.test is not None else None
    splits = {"train": train.examples, "validation": validation.examples} | ({"test": test.examples} if test else {})
    return Prepared(
        train=train.examples,
        validation=validation.examples,
        test=test.examples if test else None,
        rejected=train.rejected + validation.rejected + (test.rejected if test else 0),
        digest=digest_of(splits),
    )


def summary_of(prepared: Prepared) -> DataSummary:
    """The counts for the status."""
    return DataSummary(
        train=prepared.train.groups,
        validation=prepared.validation.groups,
        test=prepared.test.groups if prepared.test is not None else 0,
        tokens=len(prepared.train.tokens),
        rejected=prepared.rejected,
    )


def _read_split(
    field: str, source: DataSource, job: FineTuneJob, tokenizer: "PreTrainedTokenizerBase", mounts: Mounts, longest: int | None
) -> _Split:
    """One split's examples. Raises JobError naming the field, the rows and what is wrong with them."""
    sft = job.spec.objective.sft
    assert sft is not None  # noqa: S101 - the spec's own rule
    encoder = Encoder(tokenizer, sft.loss_on, job.spec.training.max_sequence_length)
    location = resolve_data(source, mounts)
    kept: list[Encoded] = []
    rejected: list[Encoded] = []
    faults: list[Fault] = []
    number_of_faults = 0
    for item in _encoded(read_rows(location), job, encoder):
        if isinstance(item, Encoded):
            (kept if item.has_labels() else rejected).append(item)
        else:
            number_of_faults += 1
            faults += [item] if len(faults) < SHOWN_FAULTS else []
    if faults:
        raise JobError(Reason.DATASET_INVALID, _faults_message(field, faults, number_of_faults))
    _check_lengths(field, kept, longest)
    if rejected:
        message = "%s: %d examples hold no label within maxSequenceLength and are left out, like %s"
        log.warning(message, field, len(rejected), rejected[0].place)
    if not kept:
        raise JobError(
            Reason.DATASET_INVALID,
            f"{field}: {rejected[0].place}: no token that counts in the loss is within training.maxSequenceLength "
            f"({job.spec.training.max_sequence_length}; the example has {rejected[0].full_length}), and so in all {len(rejected)} rows",
        )
    return _Split(join([(item.tokens, item.labelled) for item in kept]), len(rejected))


def _encoded(rows: Iterator[Row | Fault], job: FineTuneJob, encoder: Encoder) -> Iterator[Encoded | Fault]:
    """Rows as tokens, a chunk at a time, with the faults among them."""
    examples = _examples(rows, job)
    while chunk := list(itertools.islice(examples, CHUNK)):
        yield from (item for item in chunk if isinstance(item, Fault))
        yield from encoder.encode([item for item in chunk if not isinstance(item, Fault)])


def _examples(rows: Iterator[Row | Fault], job: FineTuneJob) -> Iterator[Example | Fault]:
    """Rows as examples; with format auto the first row decides for all."""
    columns = {str(field): name for field, name in job.spec.data.columns.items()}
    format_: Format | None = None if job.spec.data.format == "auto" else job.spec.data.format
    for row in rows:
        if isinstance(row, Fault):
            yield row
            continue
        if format_ is None:
            detected = detect_format(row, columns)
            if isinstance(detected, Fault):
                yield detected
                continue
            format_ = detected
        yield example_from(row, format_, columns)


def _faults_message(field: str, faults: list[Fault], number: int) -> str:
    more = f"; and {number - len(faults)} more such rows" if number > len(faults) else ""
    return f"{field}: {number} {'row' if number == 1 else 'rows'} cannot be used. " + "; ".join(map(str, faults)) + more


def _check_lengths(field: str, kept: list[Encoded], longest: int | None) -> None:
    if longest is None:
        return
    over = [item for item in kept if len(item.tokens) > longest]
    if over:
        raise JobError(
            Reason.INVALID_SPEC,
            f"{field}: {over[0].place} has {over[0].full_length} tokens and the model takes {longest}: "
            f"set training.maxSequenceLength to at most {longest}, which cuts {len(over)} examples",
        )


def _held_out(train: _Split, fraction: float, seed: int) -> tuple[_Split, _Split]:
    """Train without the held-out examples, and these: at least one each, chosen by the seed, both in their first order."""
    count = len(train.examples)
    if count < 2:
        problem = "data.train: one example is too few to hold some out for validation; set data.validation.source"
        raise JobError(Reason.DATASET_INVALID, problem)
    held = min(max(1, round(count * fraction)), count - 1)
    order = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, _HOLD_OUT])).permutation(count)
    chosen, rest = np.sort(order[:held]), np.sort(order[held:])
    return _Split(train.examples.take(rest), train.rejected), _Split(train.examples.take(chosen), 0)
