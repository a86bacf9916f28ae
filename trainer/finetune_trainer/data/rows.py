"""Rows out of files: jsonl, json, csv, parquet, one file or a folder of one form. Every fault is told by file, line and what is wrong.

A row that cannot be read becomes a Fault among the rows, so that one look at a file finds all of them; a file that cannot be read at all
raises.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from finetune_api.reasons import Reason
from finetune_trainer.data.json_values import BadJsonError, elements, parsed
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location, explained, files_under, patiently

_BLOCK = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HALF_CHARACTER = b"\\ud"
FORMS = (".jsonl", ".json", ".csv", ".parquet")
ROW_BYTES = 16 << 20
"""Largest row; a longer one is a file of another form, or a mistake."""
COLUMNS_SHOWN, NAME_SHOWN = 20, 60
"""Columns that a message names at most, and characters of a name."""


@dataclass(frozen=True)
class Place:
    """Where a row stands: the file as the job names it, and its line (jsonl, csv) or number (json, parquet), from 1."""

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True)
class Row:
    """One row: the columns by name."""

    place: Place
    columns: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One row that cannot be used, and why."""

    place: Place
    problem: str
    counts: bool = True
    """Whether the row itself is wrong, which maxRejectedFraction bounds; else it is left out and told of all the same: nothing could be
    made of it."""

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


def columns_of(row: Row) -> str:
    """The names of a row's columns, for a message: the first, and each as far as it is short."""
    names = [name if len(name) <= NAME_SHOWN else f"{name[: NAME_SHOWN - 1]}…" for name in list(row.columns)[:COLUMNS_SHOWN]]
    return ", ".join(names) or "none"


def read_rows(location: Location) -> Iterator[Row | Fault]:
    """The rows of a file, or of the files of a folder in the order of their names.

    Raises JobError (DatasetNotFound, DatasetInvalid, AuthenticationFailed, StorageUnavailable) where there is nothing that can be read.
    """
    found = False
    for file, form in data_files(location):
        for row in _read_file(file, form):
            found = True
            yield row
    if not found:
        raise JobError(Reason.DATASET_INVALID, f"{location.uri} has no rows")


def data_files(location: Location) -> list[tuple[Location, str]]:
    """The files that hold rows, with their forms: the ending. Raises JobError."""
    try:
        files = patiently(lambda: files_under(location))
    except Exception as error:
        raise explained(error, location.uri, Reason.DATASET_NOT_FOUND) from error
    formed = [(file, form) for file in files if (form := _form(file.uri)) is not None]
    if not formed:
        what = "holds no file" if len(files) != 1 or files[0].uri != location.uri else "is no file"
        raise JobError(Reason.DATASET_INVALID, f"{location.uri} {what} that ends in {', '.join(FORMS)}")
    forms = sorted({form for _, form in formed})
    if len(forms) > 1:
        several = ", ".join(forms)
        raise JobError(Reason.DATASET_INVALID, f"{location.uri} holds files of several forms ({several}); name one file or one form")
    return formed


def _form(uri: str) -> str | None:
    return next((form for form in FORMS if uri.lower().endswith(form)), None)


def _read_file(file: Location, form: str) -> Iterator[Row | Fault]:
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[form]
    try:
        with patiently(lambda: file.filesystem.open(file.path, "rb")) as stream:
            yield from reader(stream if file.local_path() else io.BufferedReader(_Raw(stream), _BLOCK), file.uri)
    except OSError as error:
        raise explained(error, file.uri, Reason.DATASET_NOT_FOUND) from error


class _Raw(io.RawIOBase):
    """A remote file as Python's own buffers take it: those of the file systems differ, and some read a line as long as it is."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """Parquet is read from its end."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """The new place."""
        self._stream.seek(offset, whence)
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any writable buffer
        """Bytes read."""
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _jsonl(stream: IO[bytes], file: str) -> Iterator[Row | Fault]:
    number = 0
    while line := stream.readline(ROW_BYTES + 1):
        number += 1
        place = Place(file, number)
        if len(line) > ROW_BYTES:
            yield Fault(place, f"the row is longer than {ROW_BYTES >> 20} MiB")
            while line and not line.endswith(b"\n"):
                line = stream.readline(ROW_BYTES)
        elif line.strip():
            yield _json_row(line, place)


def _json_row(line: bytes, place: Place) -> Row | Fault:
    try:
        value = parsed(line.rstrip())
    except BadJsonError as error:
        return Fault(place, f"the row {error}")
    return _object_row(value, place, may_be_broken=_HALF_CHARACTER in line.lower())


def _object_row(value: object, place: Place, *, may_be_broken: bool) -> Row | Fault:
    """The row, if it is an object. Half a character, as an escape that was cut in two leaves it, is no text that could be written again."""
    if not isinstance(value, dict):
        return Fault(place, f"the row is {kind_of(value)}, not an object")
    if may_be_broken:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Fault(place, "the row holds half a character (an unpaired \\ud800 to \\udfff)")
    return Row(place, value)


def _json(stream: IO[bytes], file: str) -> Iterator[Row | Fault]:
    """One array of objects. A file that holds an object a line, as many are, is read as jsonl."""
    beginning = stream.read(_BLOCK).removeprefix(_BYTE_ORDER_MARK).lstrip()
    stream.seek(0)
    if beginning and not beginning.startswith(b"["):
        yield from _json_lines(stream, file)
    elif beginning:
        try:
            for number, (value, text) in enumerate(elements(stream, ROW_BYTES), 1):
                yield _object_row(value, Place(file, number, "row"), may_be_broken=_HALF_CHARACTER.decode() in text.lower())
        except BadJsonError as error:
            raise JobError(Reason.DATASET_INVALID, f"{file}, line {error.line}: the file {error}") from error


def _json_lines(stream: IO[bytes], file: str) -> Iterator[Row | Fault]:
    """A file of JSON that is no array: an object a line, unless all of it is one value."""
    content = stream.read(ROW_BYTES)
    try:
        value = parsed(content)
    except BadJsonError as error:
        if not content.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"{"):
            raise JobError(Reason.DATASET_INVALID, f"{file}, line {error.line}: the file {error}") from error
        stream.seek(0)
        yield from _jsonl(stream, file)
        return
    raise JobError(Reason.DATASET_INVALID, f"{file} holds {kind_of(value)}, not an array of objects")


def _csv(stream: IO[bytes], file: str) -> Iterator[Row | Fault]:
    """A header line, then rows. Quoted values may hold line breaks; a row's line is its first."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(ROW_BYTES)
    reader = csv.reader(_lines(text), strict=True)
    line = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise JobError(Reason.DATASET_INVALID, f"{file}, line 1: a column's name is empty or stands twice: {', '.join(header)}")
        line = reader.line_num + 1
        for values in reader:
            place, line = Place(file, line), reader.line_num + 1
            if values:
                yield _csv_row(header, values, place)
    except csv.Error as error:
        raise JobError(Reason.DATASET_INVALID, f"{file}, line {line}: the row is not CSV: {error}") from error


def _lines(text: IO[str]) -> Iterator[str]:
    """The lines, none of which is read further than a row may be long. Raises csv.Error."""
    while line := text.readline(ROW_BYTES + 1):
        if len(line) > ROW_BYTES:
            raise csv.Error(f"a line longer than {ROW_BYTES >> 20} MiB")
        yield line


def _csv_row(header: list[str], values: list[str], place: Place) -> Row | Fault:
    if len(values) != len(header):
        return Fault(place, f"the row has {len(values)} values, the header {len(header)} columns")
    if any("\udc80" <= character <= "\udcff" for value in values for character in value):
        return Fault(place, "the row is not UTF-8")
    return Row(place, dict(zip(header, values, strict=True)))


def _parquet(stream: IO[bytes], file: str) -> Iterator[Row | Fault]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=1024):
            for columns in batch.to_pylist():
                number += 1
                yield Row(Place(file, number, "row"), columns)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow tells of damaged content, too, by an OSError, but by one that no system call made.
        if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
            raise
        problem = f"{file} is not a parquet file that can be read (after row {number}): {str(error).splitlines()[0]}"
        raise JobError(Reason.DATASET_INVALID, problem) from error


def kind_of(value: object) -> str:
    """A JSON value's kind, for a message."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)
