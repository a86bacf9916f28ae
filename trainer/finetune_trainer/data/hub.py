"""Data sets of the hub by their name, read through `datasets`: row by row, without a copy on this machine, and never a script of theirs."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from finetune_api.reasons import Reason
from finetune_trainer.data.rows import Fault, Place, Row
from finetune_trainer.errors import JobError
from finetune_trainer.sources import explained, is_transient, patiently

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True)
class HubSplit:
    """One split of a hub data set, at the commit that was the newest when it was first asked for."""

    name: str
    """owner/name."""
    subset: str | None
    split: str | None
    """None takes the data set's only split, or the one that is called as `purpose`."""
    purpose: str
    """train, validation or test."""
    token: str | None

    @property
    def uri(self) -> str:
        """The data set as a job names it."""
        return f"hf://datasets/{self.name}"

    def identity(self) -> list[str]:
        """Commit, subset and split. Raises JobError."""
        from importlib.metadata import version

        return [self.name, self._commit, self.subset or "", self.split or f"as {self.purpose}", version("datasets")]

    def state(self) -> list[str]:
        """A commit does not change."""
        return []

    def rows(self) -> Iterator[Row | Fault]:
        """The rows of the split. Raises JobError."""
        splits = self._load()
        split = self.split or (next(iter(splits)) if len(splits) == 1 else self.purpose)
        if split not in splits:
            raise JobError(
                Reason.DATASET_INVALID, f"{self.uri} has no split {split}, only {', '.join(map(str, splits))}; name one of them in split"
            )
        rows = splits[split]
        if rows.features is not None:
            rows = rows.decode(enable=False)  # images and sounds stay what they are: nothing is learnt from them
        number = 0
        try:
            for columns in rows:
                number += 1
                yield Row(Place(f"{self.uri}, {split}", number, "row"), columns)
        except Exception as error:
            raise self._told(error, f" after row {number} of {split}") from error
        if not number:
            raise JobError(Reason.DATASET_INVALID, f"{self.uri}: the split {split} has no rows")

    @cached_property
    def _commit(self) -> str:
        from huggingface_hub import HfApi

        try:
            # False, not None: never a token that happens to lie in the pod's home.
            return str(patiently(lambda: HfApi(token=self.token or False).dataset_info(self.name, timeout=30)).sha)
        except Exception as error:
            raise explained(error, self.uri, Reason.DATASET_NOT_FOUND) from error

    def _load(self) -> "dict[str, IterableDataset]":
        """All splits of the subset; nothing of their rows is read yet."""
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import datasets

        def load() -> Any:  # noqa: ANN401 - a mapping of the library's own
            return datasets.load_dataset(self.name, self.subset, revision=self._commit, token=self.token or False, streaming=True)

        try:
            return dict(patiently(load))
        except Exception as error:
            raise self._told(error, "") from error

    def _told(self, error: Exception, where: str) -> JobError:
        """What the library says is wrong with the data, or what is wrong with the way to it."""
        if isinstance(error, JobError):
            return error
        is_of_access = isinstance(error, OSError) or is_transient(error) or getattr(error, "response", None) is not None
        if is_of_access and type(error).__name__ not in ("DataFilesNotFoundError", "EmptyDatasetError"):
            return explained(error, self.uri, Reason.DATASET_NOT_FOUND)
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        cause = error.__cause__
        detail = f" ({str(cause).splitlines()[0]})" if cause is not None and str(cause) else ""
        return JobError(Reason.DATASET_INVALID, f"{self.uri} cannot be read as a data set{where}: {first}{detail}")
