"""Prepared data is written as it comes: nothing but the example at hand is in memory.

The arrays are files of numpy's own form, whose header says how many values follow; it is written again when that is known.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.examples import ARRAYS, FORMAT, MANIFEST, SUITE, array_file, blocks_of

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
    with opened(folder, split, "tokens") as (tokens, _), opened(folder, split, "labelled") as (labelled, _):
        for block in blocks_of(offsets):
            lengths = np.diff(offsets[block.start : block.stop + 1])
            count = int(lengths.sum())
            yield np.fromfile(tokens, ARRAYS["tokens"], count), np.fromfile(labelled, ARRAYS["labelled"], count), lengths


def divide(folder: Path, split: str, sides: npt.NDArray[np.int8], into: Mapping[int, str]) -> None:
    """Divide a split, each part in its order: an example goes to the split of its side [N], or nowhere where there is none."""
    with ExitStack() as stack:
        writers = {side: stack.enter_context(SplitWriter(folder, name)) for side, name in into.items()}
        first = 0
        for tokens, labelled, lengths in parts_of(folder, split):
            of_examples = sides[first : first + len(lengths)]
            of_tokens = np.repeat(of_examples, lengths)
            for side, writer in writers.items():
                writer.add(tokens[of_tokens == side], labelled[of_tokens == side], lengths[of_examples == side])
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
            with opened(folder, split, part) as (file, length):
                grouped = f"/{group}" if group > 1 and not split.startswith(SUITE) else ""
                digest.update(f"{split}/{part}/{np.dtype(dtype).str}/{length}{grouped}\n".encode())
                while block := file.read(_READ):
                    digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def examples_in(folder: Path, split: str) -> int:
    """Number of examples in a split that is written."""
    with opened(folder, split, "offsets") as (_, length):
        return length - 1


def tokens_in(folder: Path, split: str) -> int:
    """Number of tokens in a split that is written."""
    with opened(folder, split, "tokens") as (_, length):
        return length


def token_quantiles(folder: Path, split: str) -> dict[str, int]:
    """How many tokens a split's examples have: the least, the most, and what half of them and 95 percent have at most."""
    offsets = np.load(folder / array_file(split, "offsets"), mmap_mode="r", allow_pickle=False)
    counts = np.zeros(1, np.int64)
    for start in range(0, len(offsets) - 1, _READ):
        found = np.bincount(np.diff(offsets[start : start + _READ + 1]), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    upto = np.cumsum(counts)
    ranks = {"min": 1, "median": (upto[-1] + 1) // 2, "p95": -(-upto[-1] * 95 // 100), "max": upto[-1]}
    return {name: int(np.searchsorted(upto, max(1, rank))) for name, rank in ranks.items()} if upto[-1] else dict.fromkeys(ranks, 0)


@contextmanager
def opened(folder: Path, split: str, part: str) -> Iterator[tuple[IO[bytes], int]]:
    """An array's file from its first value on, and the number of its values. Read and not mapped: what is read once is not worth a page."""
    with (folder / array_file(split, part)).open("rb") as file:
        np.lib.format.read_magic(file)
        (length,), _, _ = np.lib.format.read_array_header_1_0(file)
        yield file, length
