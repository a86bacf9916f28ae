"""Tokenised examples: three flat arrays for each split, in memory as on disk, where they are mapped and not read.

A folder of prepared data holds, for each split, `<split>-tokens.npy`, `<split>-labelled.npy`, `<split>-offsets.npy`, and `manifest.json`,
which comes last: a folder without it is not there. Beside them may be `<split>-cases.jsonl` (see cases.py) and `rejects.jsonl` (see
left_out.py). The digest covers every array, so that the same digest is the same data. `writing`
makes such a folder.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location

MANIFEST = "manifest.json"
FORMAT = 5
"""Version of the folder's form."""
BLOCK = 1 << 20
"""Tokens that are worked on at a time where all are gone through."""
SPLITS = ("train", "validation", "test")
SUITE = "suite-"
"""What the split of a suite that has data of its own begins with; the suite's name follows."""
ARRAYS = {"tokens": "<i4", "labelled": "|b1", "offsets": "<i8"}
"""The arrays of a split, with their types in a file."""


@dataclass(frozen=True)
class Examples:
    """Token sequences, one after the other.

    - tokens: int32 [T], all examples' tokens
    - labelled: bool [T], whether the token counts in the loss; it is predicted from those before it, so an example's first never counts
    - offsets: int64 [N + 1]; example i is tokens[offsets[i]:offsets[i + 1]]
    - group: how many consecutive examples belong together: 1, or 2 for preference data (the chosen answer, the rejected one)
    """

    tokens: npt.NDArray[np.int32]
    labelled: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    group: int = 1

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def groups(self) -> int:
        """What people call the number of examples: a pair counts once."""
        return len(self) // self.group

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example: int64 [N]."""
        return np.diff(self.offsets)

    def label_counts(self) -> npt.NDArray[np.int64]:
        """Tokens of each example that the loss is taken over: int64 [N]."""
        counts = np.zeros(len(self), np.int64)
        for block in blocks_of(self.offsets):
            bounds = self.offsets[block.start : block.stop + 1]
            sums = np.concatenate([[0], np.cumsum(self.labelled[bounds[0] : bounds[-1]], dtype=np.int64)])
            starts, ends = bounds[:-1] - bounds[0], bounds[1:] - bounds[0]
            counts[block] = sums[ends] - sums[np.minimum(starts + 1, ends)]
        return counts

    def example(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """The tokens and the label mask of one example."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.labelled[span]

    def take(self, groups: Sequence[int] | npt.NDArray[np.int64]) -> "Examples":
        """These groups, in this order."""
        return join([self.example(int(group) * self.group + each) for group in groups for each in range(self.group)], self.group)


def join(parts: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]], group: int = 1) -> Examples:
    """One value out of single examples."""
    lengths = np.array([len(tokens) for tokens, _ in parts], dtype=np.int64)
    return Examples(
        tokens=np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in parts)]),
        labelled=np.concatenate([np.empty(0, np.bool_), *(labelled for _, labelled in parts)]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        group=group,
    )


@dataclass(frozen=True)
class Prepared:
    """The data of a job, ready to be trained on. `test` is None where the job has none."""

    train: Examples
    validation: Examples
    test: Examples | None
    rejected: int
    """Rows that were left out: they could not be used, or nothing of them to learn from was left within maxSequenceLength."""
    digest: str
    """`sha256:` and the digest of all arrays."""
    suites: Mapping[str, Examples] = field(default_factory=dict)
    """The examples of suites that have data of their own, by the suite's name."""

    def splits(self) -> dict[str, Examples]:
        """The splits that there are, by name, in the order of the digest."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: examples for name, examples in named.items() if examples is not None}


def blocks_of(offsets: npt.NDArray[np.int64], most: int | None = None) -> Iterator[slice]:
    """Examples, one after the other, that come to BLOCK tokens at most, or so many, or to one example: work on them is bounded."""
    start, most = 0, BLOCK if most is None else most
    while start < len(offsets) - 1:
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + most, side="right")) - 1)
        yield slice(start, stop)
        start = stop


def array_file(split: str, part: str) -> str:
    """Name of an array's file."""
    return f"{split}-{part}.npy"


def read_manifest(folder: Location) -> dict[str, Any] | None:
    """The manifest of a prepared folder, or None where there is none of this form."""
    try:
        with folder.filesystem.open(f"{folder.path}/{MANIFEST}", "rb") as file:
            manifest = json.loads(file.read())
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def open_prepared(folder: Location, cache: Path) -> Prepared:
    """Map a prepared folder into memory. A folder that is not on a local file system is first copied into `cache`.

    Raises JobError (StorageUnavailable) where the folder is incomplete.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise JobError(Reason.STORAGE_UNAVAILABLE, f"{folder.uri} holds no prepared data")
    local = folder.local_path() or _copied(folder, manifest, cache)

    def split(name: str) -> Examples:
        tokens, labelled, offsets = (np.load(local / array_file(name, part), mmap_mode="r", allow_pickle=False) for part in ARRAYS)
        return Examples(tokens, labelled, offsets, 1 if name.startswith(SUITE) else manifest["group"])

    try:
        splits = {name: split(name) for name in manifest["splits"]}
    except (OSError, ValueError, EOFError) as error:
        raise JobError(Reason.STORAGE_UNAVAILABLE, f"{folder.uri}: the prepared data cannot be read: {error}") from error
    suites = {name.removeprefix(SUITE): examples for name, examples in splits.items() if name.startswith(SUITE)}
    return Prepared(splits["train"], splits["validation"], splits.get("test"), manifest["rejected"], manifest["digest"], suites)


def _copied(folder: Location, manifest: dict[str, Any], cache: Path) -> Path:
    """The folder's files in a local folder named by their digest, copied once."""
    local = cache / str(manifest["digest"]).replace(":", "-")
    if local.exists():
        return local
    aside = local.with_name(f".{local.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name in manifest["splits"]:
        for part in ARRAYS:
            folder.filesystem.get_file(f"{folder.path}/{array_file(name, part)}", str(aside / array_file(name, part)))
    _check_digest(aside, manifest, folder)
    aside.rename(local)
    return local


def _check_digest(copy: Path, manifest: dict[str, Any], folder: Location) -> None:
    """Raise JobError (StorageUnavailable) where a copy is not what the manifest says: two uploads at once may have become mixed.

    The folder counts for nothing then, so that the next attempt makes it again.
    """
    from finetune_trainer.data.writing import digest_of

    if digest_of(copy, manifest["splits"], manifest["group"]) == manifest["digest"]:
        return
    with suppress(OSError):
        folder.filesystem.rm_file(f"{folder.path}/{MANIFEST}")
    problem = f"{folder.uri}: the prepared data is not as it was written; the next attempt prepares it again"
    raise JobError(Reason.STORAGE_UNAVAILABLE, problem)
