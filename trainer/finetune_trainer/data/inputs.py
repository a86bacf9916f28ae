"""Where a split's rows come from: files, or a split of a hub data set; with what tells it from another, so that the same is known again."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import DataSource
from finetune_trainer.data.hub import HubSplit
from finetune_trainer.data.rows import Fault, Row, data_files, read_rows
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location, Mounts, explained, hub_token, patiently, resolve_data

_BLOCK = 1 << 20
_HUB_DATA_SET = re.compile(r"hf://datasets/([^/]+/[^/]+)/?")


class Input(Protocol):
    """Rows, and their identity. Both raise JobError (DatasetNotFound, DatasetInvalid, AuthenticationFailed, StorageUnavailable)."""

    def rows(self) -> Iterator[Row | Fault]:
        """The rows, in an order that is always the same."""
        ...

    def identity(self) -> list[str]:
        """What the rows follow from: equal where they are equal for sure."""
        ...

    def state(self) -> list[str]:
        """What shows that the rows have changed since the identity was taken, and costs nothing."""
        ...


def input_of(source: DataSource, split: str, mounts: Mounts) -> Input:
    """The input of a split: `train`, `validation` or `test`. Raises JobError where its Secret, claim or ConfigMap is not there."""
    data_set = _HUB_DATA_SET.fullmatch(source.source or "")
    if data_set is None:
        return Files(resolve_data(source, mounts))
    token = hub_token(mounts, source.secret_ref.name if source.secret_ref else None)
    return HubSplit(data_set[1], source.subset, source.split, split, token)


@dataclass(frozen=True)
class Files:
    """A file, or the files of a folder."""

    location: Location

    def rows(self) -> Iterator[Row | Fault]:
        """The rows of all files."""
        return read_rows(self.location)

    def identity(self) -> list[str]:
        """The form and the content of each file, wherever it is and whatever its name."""
        return [f"{form} {_digest(file)}" for file, form in data_files(self.location)]

    def state(self) -> list[str]:
        """Names, sizes and times of change."""
        return [f"{file.uri} {_state(file)}" for file, _ in data_files(self.location)]


def _digest(file: Location) -> str:
    """What names a file's content: a hub's own digest of it, else sha256 of its bytes; a size, a time or an ETag proves nothing."""
    try:
        blob = file.filesystem.info(file.path).get("blob_id")
        return f"blob:{blob}" if blob else patiently(lambda: _sha256(file))
    except Exception as error:
        raise explained(error, file.uri, Reason.DATASET_NOT_FOUND) from error


def _sha256(file: Location) -> str:
    digest = hashlib.sha256()
    with file.filesystem.open(file.path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _state(file: Location) -> str:
    try:
        info = file.filesystem.info(file.path)
    except Exception as error:
        raise explained(error, file.uri, Reason.DATASET_NOT_FOUND) from error
    return f"{info.get('size')} {info.get('mtime')}"


def check_unchanged(before: list[str], after: list[str], field: str) -> None:
    """Raise JobError (DatasetInvalid) where an input's state is not what it was: what was read is no one version of it."""
    if before != after:
        raise JobError(Reason.DATASET_INVALID, f"{field}: the data has changed while it was read; try again when it is complete")
