"""Prepared data is written as it comes: nothing but the example at hand is in memory.

The arrays are files of numpy's own form, whose header says how many values follow; it is written again when that is known.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.examples import ARRAYS, FORMAT, MANIFEST, array_file, blocks_of

_READ = 1 << 20
Part = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.int64]]
"""Some examples, one after the other: tokens [T], labelled [T], and the length of each example [N]."""


class SplitWriter:
    """The three arrays of a split, growing. A context: on leaving it, the files are whole."""

    def __init__(self, folder: Path, split: str) -> None:
        self._arrays = {part: _ArrayFile(folder / array_file(split, part), dtype) for part, dtype in ARRAYS.items()}
        self._arrays["offsets"].append(np.zeros(1, np.int64))
        self.examples = 0
        self.tokens = 0

    def add(self, tokens: npt.NDArray[np.int32], labelled: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64] | None = None) -> None:
        """Append examples, one after the other, that have these lengths; one example where none are given. Raises OSError."""
        lengths = np.array([len(tokens)], np.int64) if lengths is None else lengths
        self._arrays["tokens"].append(tokens)
        self._arrays["labelled"].append(labelled)
        self._arrays["offsets"].append(self.tokens + np.cumsum(lengths))
        self.examples += len(lengths)
        self.tokens += len(tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for array in self._arrays.values():
            array.close()


class _ArrayFile:
    """One array [N] in a file, growing."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file = path.open("wb", buffering=1 << 18)
        self._dtype, self._length = np.dtype(dtype), 0
        self._write_header()

    def append(self, values: npt.NDArray[Any]) -> None:
        """More values. Raises OSError."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)

    def close(self) -> None:
        """Say how many there are. numpy leaves room in the header for any number."""
        with self._file:
            self._file.seek(0)
            self._write_header()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def parts_of(folder: Path, split: str) -> Iterator[Part]:
    """The examples of a split again, in their order, a block at a time."""
    offsets = np.load(folder / array_file(split, "offsets"), mmap_mode="r", allow_pickle=False)
    with _opened(folder, split, "tokens") as (tokens, _), _opened(folder, split, "labelled") as (labelled, _):
        for block in blocks_of(offsets):
            lengths = np.diff(offsets[block.start : block.stop + 1])
            count = int(lengths.sum())
            yield np.fromfile(tokens, ARRAYS["tokens"], count), np.fromfile(labelled, ARRAYS["labelled"], count), lengths


def divide(folder: Path, split: str, chosen: npt.NDArray[np.bool_], rest: str, taken: str) -> None:
    """Divide a split in two, both in its order: the examples that are `chosen` [N] go to `taken`, the others to `rest`."""
    with SplitWriter(folder, rest) as rest_writer, SplitWriter(folder, taken) as taken_writer:
        first = 0
        for tokens, labelled, lengths in parts_of(folder, split):
            is_taken = chosen[first : first + len(lengths)]
            of_taken = np.repeat(is_taken, lengths)
            rest_writer.add(tokens[~of_taken], labelled[~of_taken], lengths[~is_taken])
            taken_writer.add(tokens[of_taken], labelled[of_taken], lengths[is_taken])
            first += len(lengths)
    for part in ARRAYS:
        (folder / array_file(split, part)).unlink()


def write_manifest(folder: Path, splits: Sequence[str], group: int, facts: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the splits that are written, with more facts in it; last of all files. Returns it."""
    manifest = {
        "format": FORMAT,
        "digest": digest_of(folder, splits, group),
        "splits": list(splits),
        "group": group,
        "bytes": {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()},
        **facts,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return manifest


def digest_of(folder: Path, splits: Sequence[str], group: int) -> str:
    """`sha256:...` over the splits' names and arrays."""
    digest = hashlib.sha256()
    for split in splits:
        for part, dtype in ARRAYS.items():
            with _opened(folder, split, part) as (file, length):
                grouped = f"/{group}" if group > 1 else ""
                digest.update(f"{split}/{part}/{np.dtype(dtype).str}/{length}{grouped}\n".encode())
                while block := file.read(_READ):
                    digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def examples_in(folder: Path, split: str) -> int:
    """Number of examples in a split that is written."""
    with _opened(folder, split, "offsets") as (_, length):
        return length - 1


def tokens_in(folder: Path, split: str) -> int:
    """Number of tokens in a split that is written."""
    with _opened(folder, split, "tokens") as (_, length):
        return length


@contextmanager
def _opened(folder: Path, split: str, part: str) -> Iterator[tuple[IO[bytes], int]]:
    """An array's file from its first value on, and the number of its values. Read and not mapped: what is read once is not worth a page."""
    with (folder / array_file(split, part)).open("rb") as file:
        np.lib.format.read_magic(file)
        (length,), _, _ = np.lib.format.read_array_header_1_0(file)
        yield file, length
