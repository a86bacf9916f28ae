"""Rows that are left out, each with its place and why, as a file of JSON lines; and the places of those that are not."""

import json
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from finetune_api.scrub import scrub
from finetune_trainer.data.rows import Place

REJECTS = "rejects.jsonl"


class LeftOut:
    """`rejects.jsonl` of a folder, growing, which is there once a row is left out. A context. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / REJECTS
        self._file: IO[str] | None = None

    def add(self, data: str, place: Place, reason: str) -> None:
        """One more row, of the data that a field of the job names."""
        self._file = self._file or self._path.open("w", encoding="utf-8")
        row = {"data": data, "file": place.file, place.unit: place.number, "reason": scrub(reason)}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


@dataclass
class Places:
    """Where rows stand that follow one another in the same files: 8 bytes for a row."""

    _numbers: "array[int]" = field(default_factory=lambda: array("q"))
    _starts: list[int] = field(default_factory=list)
    """The row that each file begins with."""
    _files: list[tuple[str, str]] = field(default_factory=list)
    """Each file, and its unit."""

    def add(self, place: Place) -> None:
        """One more row."""
        if not self._files or self._files[-1] != (place.file, place.unit):
            self._starts.append(len(self._numbers))
            self._files.append((place.file, place.unit))
        self._numbers.append(place.number)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Place:
        file, unit = self._files[bisect_right(self._starts, index) - 1]
        return Place(file, self._numbers[index], unit)
