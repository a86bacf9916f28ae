"""Bytes by name, in a file without a name that goes with this process: of each, some hundred bytes are in memory, whatever its size."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError


class Shelf:
    """A mapping that only grows. A context. Raises JobError (StorageFull) where this machine's disk is full."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed on leaving
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __contains__(self, name: bytes) -> bool:
        return name in self._places

    def put(self, name: bytes, content: bytes) -> None:
        """Keep something, in place of what had this name."""
        with _told():
            self._file.seek(self._end)
            self._file.write(content)
            self._file.flush()
        self._places[name] = self._end, len(content)
        self._end += len(content)

    def get(self, name: bytes) -> bytes | None:
        """What has this name; None where nothing has."""
        place = self._places.get(name)
        if place is None:
            return None
        self._file.seek(place[0])
        return self._file.read(place[1])


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise JobError(Reason.STORAGE_FULL, f"{tempfile.gettempdir()} of the head, not output.storage: no space is left") from error
