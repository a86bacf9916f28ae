"""All of a job's data, checked, tokenised, split and counted: the head's work, done once.

Row after row goes its whole way to the files of the prepared folder; what is held at a time is some chunks of examples, whatever the size
of the data, but for the numbers of rows (8 bytes an example) and what the checks hold: see held_out, duplicates and leakage, each of which
holds bytes for an example and no text.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from finetune_api.reasons import Reason
from finetune_api.scrub import scrub
from finetune_api.status import WARNING_LENGTH_MAX, DataSummary, TokenStatistics
from finetune_api.v1alpha1 import DataSource, FineTuneJob
from finetune_trainer.data.cases import cases_file, divide_cases, some_to_show
from finetune_trainer.data.duplicates import duplicates
from finetune_trainer.data.encoding import Encoder, LossOn
from finetune_trainer.data.examples import ARRAYS, SPLITS, SUITE, Examples, array_file
from finetune_trainer.data.held_out import Sides, held_out
from finetune_trainer.data.inputs import Input, input_of
from finetune_trainer.data.leakage import SHARE, Leak, Some, leaks
from finetune_trainer.data.left_out import LeftOut
from finetune_trainer.data.reading import Answering, Kept, Reading, Source, keys_of
from finetune_trainer.data.writing import divide, examples_in, token_quantiles, tokens_in, write_manifest
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Mounts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MADE = "made"
"""The input of examples that the preparation has made; they are added to the training data."""
_UNDIVIDED = "undivided"
"""Split that training data is written to before some is held out; never seen outside."""
_LEFT_OUT = -1
"""Side of an example that is in no split."""

log = logging.getLogger(__name__)


def inputs_of(job: FineTuneJob, mounts: Mounts, made: Input | None = None) -> dict[str, Input]:
    """Where the rows of each split come from: train, validation, test and suites that have data of their own, and what was made.

    Raises JobError.
    """
    inputs = {split: input_of(source, "test" if split.startswith(SUITE) else split, mounts) for split, source in sources_of(job).items()}
    return inputs if made is None else inputs | {MADE: made}


def sources_of(job: FineTuneJob) -> dict[str, DataSource]:
    """The splits that have data of their own: train, validation and test, and `suite-<name>`."""
    suites = {f"{SUITE}{suite.name}": suite.data_source() for suite in job.spec.evaluation.suites}
    return job.spec.data.sources() | {split: source for split, source in suites.items() if source is not None}


def field_of(split: str) -> str:
    """The job's field that an input's rows come from."""
    if split.startswith(SUITE):
        return f"evaluation.suites.{split.removeprefix(SUITE)}"
    return "data.preparation" if split == MADE else f"data.{split}"


class ExampleTeacher(Answering, Protocol):
    """A served teacher, whose answers to the prompts of the training data take the place of the data's own."""

    def identity(self) -> dict[str, Any]:
        """What its answers follow from."""
        ...

    def write(self, folder: Path, train: Examples) -> None:
        """Leave beside the prepared data what else it has said of it."""
        ...


def write_data(
    folder: Path,
    job: FineTuneJob,
    inputs: Mapping[str, Input],
    tokenizer: "PreTrainedTokenizerBase",
    longest: int | None = None,
    teacher: ExampleTeacher | None = None,
) -> dict[str, Any]:
    """Read, check and tokenise every split into a folder, and hold out the fractions.

    `longest` is the longest example that the model takes; `teacher` answers the training data's prompts, what is held out of it too.
    Returns the manifest, which has the counts for the status in `summary` and what the job's owner should know in `warnings`. Also where
    this raises, `rejects.jsonl` has every row that was left out till then.
    Raises OSError, and JobError (DatasetNotFound, DatasetInvalid, AuthenticationFailed, ...), for bad rows with the first by file, line and
    field and with their number.
    """
    with LeftOut(folder) as left_out:
        encoder = Encoder(tokenizer, loss_on(job), job.spec.training.max_sequence_length)
        reading = Reading(folder, job, encoder, longest, left_out)
        whole = _TrainingData(reading, *_written(reading, inputs, teacher))
        whole.leave_out_duplicates()
        whole.hold_out()
        warnings = [*whole.check_groups(), *whole.check_leakage()]
        whole.divide()
    if teacher is not None:
        teacher.write(folder, Examples(*(np.load(folder / array_file("train", part), mmap_mode="r") for part in ARRAYS)))
    return _with_manifest(whole, inputs, warnings)


def loss_on(job: FineTuneJob) -> LossOn:
    """Which tokens are labels. Of preferences it is the answers."""
    objective = job.spec.objective
    labelled = objective.sft or objective.distillation
    return labelled.loss_on if labelled is not None else "completion"


def wants_cases(job: FineTuneJob) -> bool:
    """Whether examples are asked, beside being measured: then their texts are kept with what is held out."""
    return job.spec.baseline is not None or any(suite.lm_eval is None for suite in job.spec.evaluation.suites)


def shows_examples(job: FineTuneJob) -> bool:
    """Whether a prompt of the baseline shows training examples."""
    return job.spec.baseline is not None and any(prompt.examples for prompt in job.spec.baseline.prompts)


def fractions_of(job: FineTuneJob) -> dict[str, float]:
    """The splits that are held out of the training data, and how much of it each is."""
    held = {"validation": job.spec.data.validation, "test": job.spec.data.test}
    return {split: source.fraction for split, source in held.items() if source is not None and source.fraction is not None}


def _group_of(job: FineTuneJob, split: str = "train") -> int:
    """Documents that belong together: a preference's two answers. Of a suite's preferences there is only the better one."""
    return 1 if job.spec.objective.dpo is None or split.startswith(SUITE) else 2


def _written(reading: Reading, inputs: Mapping[str, Input], teacher: ExampleTeacher | None) -> tuple[str, Kept, dict[str, Kept]]:
    """Write the training data, and the splits that have data of their own. Returns where the first is, and what was kept of each."""
    job = reading.job
    preparation, cases = job.spec.data.preparation, wants_cases(job)
    to_divide = fractions_of(job) or preparation.deduplicate != "none" or preparation.leakage == "drop" or shows_examples(job)
    target = _UNDIVIDED if to_divide else "train"
    sources = [Source(field_of("train"), inputs["train"], teacher)] if "train" in inputs else []
    sources += [Source(field_of(MADE), inputs[MADE], teacher, kind="made")] if MADE in inputs else []
    train = reading.write(target, sources, _group_of(job), cases=shows_examples(job) or (cases and bool(fractions_of(job))))
    if not len(train.places):
        raise JobError(Reason.DATASET_INVALID, "data: there is no example to train on: set data.train, or let data.preparation make some")
    limits = {f"{SUITE}{suite.name}": suite.limit for suite in job.spec.evaluation.suites}
    others = {}
    for split in (name for name in inputs if name not in ("train", MADE)):
        source = Source(field_of(split), inputs[split], kind="suite" if split in limits else "rows", limit=limits.get(split))
        others[split] = reading.write(split, [source], _group_of(job, split), cases=cases)
    return target, train, others


@dataclass
class _TrainingData:
    """The training data as it was read, until it is divided."""

    reading: Reading
    split: str
    """Where it is written."""
    kept: Kept
    others: dict[str, Kept]
    """Splits that have data of their own."""

    def __post_init__(self) -> None:
        self.sides: Sides = np.zeros(len(self.kept.places), np.int8)
        self.group = _group_of(self.reading.job)
        self.duplicates = 0
        self.leaked = 0

    def leave_out_duplicates(self) -> None:
        """All but the first of those that are the same, where the job asks for that."""
        kind = self.reading.job.spec.data.preparation.deduplicate
        if kind == "none":
            return
        repeats = duplicates(self.reading.folder, self.split, kind, self.group)
        for index in np.flatnonzero(repeats >= 0).tolist():
            first = int(repeats[index])
            self._leave_out(index, f"{'a duplicate' if kind == 'exact' else 'a duplicate, or nearly,'} of {self.kept.places[first]}")
            self.duplicates += 1

    def hold_out(self) -> None:
        """What the fractions ask for."""
        fractions = {SPLITS.index(split): fraction for split, fraction in fractions_of(self.reading.job).items()}
        if not fractions:
            return
        free, keys = np.flatnonzero(self.sides == 0), keys_of(self.kept)
        seed = self.reading.job.spec.training.seed
        self.sides[free] = held_out(len(free), fractions, seed, None if keys is None else keys[free])

    def check_groups(self) -> list[str]:
        """Look for training examples of groups that validation or test data of its own has too: what is done is as for leakage.

        Returns what there is to warn of. Raises JobError (DatasetInvalid).
        """
        what, keys = self.reading.job.spec.data.preparation.leakage, keys_of(self.kept)
        others = {split: found for split in self.others if (found := keys_of(self.others[split])) is not None}
        if what == "ignore" or keys is None or not others:
            return []
        shared = np.flatnonzero((self.sides == 0) & np.isin(keys, np.concatenate(list(others.values())))).tolist()
        if not shared:
            return []
        names, column = " and ".join(f"data.{split}" for split in others), self.reading.job.spec.data.group_by
        problem = (
            f"data.groupBy: {len(shared):,} of {int((self.sides == 0).sum()):,} training examples have a value of {column} that {names} "
            f"has too: set data.preparation.leakage: drop, or take them out. The first: {self.kept.places[shared[0]]}"
        )
        if what == "fail":
            raise JobError(Reason.DATASET_INVALID, problem)
        if what == "warn":
            return [scrub(problem)[:WARNING_LENGTH_MAX]]
        for index in shared:
            self._leave_out(index, f"its value of {column} is one that {names} has too")
        self.leaked += len(shared)
        if not (self.sides == 0).any():
            raise JobError(Reason.DATASET_INVALID, f"{problem}; without them none is left")
        return []

    def check_leakage(self) -> list[str]:
        """Look for training examples that hold what is measured; returns what there is to warn of. Raises JobError (DatasetInvalid)."""
        what = self.reading.job.spec.data.preparation.leakage
        if what == "ignore":
            return []
        held = self._held()
        found = leaks(self.reading.folder, Some(self.split, self.sides == 0, self.group), [some for _, some in held])
        self.leaked += len(found)
        if not found:
            return []
        problem = self._told(found, [name for name, _ in held])
        if what == "fail":
            raise JobError(Reason.DATASET_INVALID, problem)
        if what == "warn":
            return [scrub(problem)[:WARNING_LENGTH_MAX]]
        for leak in found:
            self._leave_out(leak.example, f"it holds {self._place(held[leak.split][0], leak.held)}, which is held out")
        if not (self.sides == 0).any():
            raise JobError(Reason.DATASET_INVALID, f"{problem}; without them none is left")
        return []

    def divide(self) -> None:
        """Bring each example to its split."""
        folder, job = self.reading.folder, self.reading.job
        if self.split != _UNDIVIDED:
            return
        into = {0: "train"} | {SPLITS.index(split): split for split in fractions_of(job)}
        divide(folder, self.split, np.repeat(self.sides, self.group), into)
        if not (folder / cases_file(self.split)).exists():
            return
        sides = self.sides.copy()
        sides[(sides == 0) & ~some_to_show(sides, 0, job.spec.training.seed)] = _LEFT_OUT
        divide_cases(folder, self.split, sides, into if shows_examples(job) else {side: split for side, split in into.items() if side})

    def _leave_out(self, index: int, reason: str) -> None:
        self.sides[index] = _LEFT_OUT
        made = index in self.kept.made
        self.reading.left_out.add(field_of(MADE if made else "train"), self.kept.places[index], reason)

    def _held(self) -> list[tuple[str, Some]]:
        """What is measured, by its split."""
        job, others = self.reading.job, self.others.items()
        of_fractions = [(split, Some(self.split, self.sides == SPLITS.index(split), self.group)) for split in fractions_of(job)]
        return of_fractions + [(split, Some(split, np.ones(len(kept.places), np.bool_), _group_of(job, split))) for split, kept in others]

    def _place(self, split: str, index: int) -> str:
        """Where a held-out example stands."""
        return str(self.others.get(split, self.kept).places[index])

    def _told(self, found: Sequence[Leak], splits: Sequence[str]) -> str:
        """What was found, in a sentence."""
        names = sorted({splits[leak.split] for leak in found}, key=splits.index)
        fields = [f"the suite {name.removeprefix(SUITE)}" if name.startswith(SUITE) else f"data.{name}" for name in names]
        first = found[0]
        return (
            f"data.train: {len(found):,} of {int((self.sides == 0).sum()):,} training examples hold {SHARE:.0%} or more of an example that "
            f"is measured ({', '.join(fields)}), so what is measured there says little of other data: set data.preparation.leakage: drop, "
            f"or data.groupBy where rows belong together. The first: {self.kept.places[first.example]} holds "
            f"{self._place(splits[first.split], first.held)}"
        )


def _with_manifest(whole: _TrainingData, inputs: Mapping[str, Input], warnings: Sequence[str]) -> dict[str, Any]:
    """Write the manifest, last of all."""
    folder, job = whole.reading.folder, whole.reading.job
    splits = [split for split in SPLITS if split in ("train", *inputs, *fractions_of(job))]
    splits += [split for split in inputs if split.startswith(SUITE)]
    counts = {split: examples_in(folder, split) // whole.group for split in splits if not split.startswith(SUITE)}
    rejected = whole.kept.rejected + sum(kept.rejected for kept in whole.others.values())
    summary = DataSummary(
        train=counts["train"],
        validation=counts["validation"],
        test=counts.get("test", 0),
        tokens=tokens_in(folder, "train"),
        rejected=rejected,
        duplicates=whole.duplicates,
        leaked=whole.leaked,
        made=len(whole.kept.made),
        made_samples=tuple(whole.kept.samples),
        tokens_per_example=TokenStatistics(**token_quantiles(folder, "train")),
    )
    facts = {"rejected": rejected, "summary": summary.to_json(), "warnings": list(warnings)}
    return write_manifest(folder, splits, whole.group, facts)
