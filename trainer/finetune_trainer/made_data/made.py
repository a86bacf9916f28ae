"""What both ways of making examples need: the row that an example becomes, who else is at hand, and the count of what came of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from finetune_api.reasons import Reason
from finetune_api.sources import ModelReference
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.data.rows import Place, Row
from finetune_trainer.errors import JobError
from finetune_trainer.retrieval.embedding import Embedder
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage

Say = Callable[[str], None]


@dataclass(frozen=True)
class Means:
    """What a job has at hand."""

    mounts: Mounts
    storage: Storage
    """output.storage."""
    namespace: str
    """The job's, whose claims, ConfigMaps and host names are its own."""
    encoder_of: Callable[[ModelReference, str], Embedder]
    """Load an encoder; the second is its field in the spec, for messages. Raises JobError."""
    say: Say


@dataclass(frozen=True)
class Shape:
    """How a prompt and its answer stand in a row, so that the job reads it as its other rows."""

    form: Literal["promptCompletion", "messages"]
    names: tuple[tuple[str, str], ...]
    """The data's own columns by field."""
    group_by: str | None
    """Column of the group."""

    def identity(self) -> list[Any]:
        """What tells it from others, as JSON."""
        return [self.form, [list(pair) for pair in self.names], self.group_by]

    def row(self, place: Place, prompt: str, answer: str, group: object = None) -> Row:
        """The example as a row."""
        names = dict(self.names)
        columns: dict[str, Any] = {} if group is None or self.group_by is None else {self.group_by: group}
        if self.form == "messages":
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            return Row(place, columns | {names.get("messages", "messages"): turns})
        return Row(place, columns | {names.get("prompt", "prompt"): prompt, names.get("completion", "completion"): answer})


def shape_of(job: FineTuneJob, *, is_chat: bool) -> Shape:
    """The rows that a job can read. `is_chat` says whether its model has a chat template, which decides where the format is auto."""
    data = job.spec.data
    form: Literal["promptCompletion", "messages"] = "messages" if data.format == "messages" else "promptCompletion"
    if data.format == "auto" and is_chat:
        form = "messages"
    return Shape(form, tuple(sorted((str(name), column) for name, column in data.columns.items())), data.group_by)


@dataclass
class Tally:
    """What came of the texts that examples are made of."""

    field: str
    origin: str
    """What one text is called."""
    part: str
    """What is written of it."""
    texts: int = 0
    unmatched: int = 0
    """Texts for which no passage was found."""
    without: int = 0
    """Texts of which no example came, though there were passages."""
    written: int = 0
    """Parts that the generator wrote."""
    kept: int = 0
    """Of these, supported ones."""
    made: int = 0
    """Examples."""

    def add(self, *, found: bool, written: int, kept: int, made: int) -> None:
        """One more text."""
        self.texts += 1
        self.unmatched += not found
        self.without += found and not kept
        self.written += written
        self.kept += kept
        self.made += made

    def finish(self, say: Say, advice: str) -> None:
        """Say what came of them. Raises JobError (DatasetInvalid) where nothing did."""
        if not self.texts:
            return  # there was nothing but faults, which are told of with the rows
        parts = [f"{self.made:,} examples of {self.texts:,} {self.origin}s"]
        parts += [f"of {self.written:,} {self.part}s written, passages support {self.kept:,}"]
        parts += [f"{self.origin}s that share no word with any passage: {self.unmatched:,}"] if self.unmatched else []
        parts += [f"{self.origin}s without a supported {self.part}: {self.without:,}"] if self.without else []
        if not self.made:
            raise JobError(Reason.DATASET_INVALID, f"{self.field}: {'; '.join(parts)}: {advice}")
        say(f"{self.field}: {'; '.join(parts)}")
