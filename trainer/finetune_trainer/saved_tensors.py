"""Tensors in safetensors files, read one by one and of each only the rows that are asked for.

Several files may hold parts of a tensor: its rows follow one another in the order of the files.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


@dataclass(frozen=True)
class SavedTensor:
    """One tensor, in one file or in several."""

    parts: tuple[Any, ...]
    """safetensors' slices of the files, in order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its whole shape."""
        shapes = [tuple(part.get_shape()) for part in self.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    @property
    def dtype(self) -> torch.dtype:
        """Its number format."""
        return self.whole().dtype if not self.shape else self.rows(0, 0).dtype

    def whole(self) -> torch.Tensor:
        """All of it."""
        if not self.shape:
            only: torch.Tensor = self.parts[0][...]
            return only
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """These rows of its first dimension; all of it where it has none."""
        if not self.shape:
            return self.whole()
        pieces, before = [], 0
        for part in self.parts:
            count = part.get_shape()[0]
            first, last = max(start - before, 0), min(stop - before, count)
            if first < last:
                pieces.append(part[first:last])
            before += count
        if not pieces:
            return torch.empty((0, *self.shape[1:]), dtype=self.parts[0][0:1].dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@contextmanager
def open_tensors(files: Sequence[Path]) -> Iterator[dict[str, SavedTensor]]:
    """All tensors of some files, by name. Raises SafetensorError where a file is not one."""
    with ExitStack() as stack:
        found: dict[str, list[Any]] = {}
        for path in files:
            file = stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118 - no mapping
                found.setdefault(name, []).append(file.get_slice(name))
        yield {name: SavedTensor(tuple(parts)) for name, parts in found.items()}
