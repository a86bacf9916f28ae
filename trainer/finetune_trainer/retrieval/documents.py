"""The documents of a knowledge base: txt, md, html and jsonl, one file or a folder of them, as sections of text under their headings.

Files of other forms that lie in the folder (pictures, style sheets) are left out and counted. What has the ending of a document and is none
is told by file and line: a knowledge base that is half read would ground less than its owner believes.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from finetune_api.reasons import Reason
from finetune_trainer.data.rows import Fault, Row, columns_of, kind_of, read_rows
from finetune_trainer.errors import JobError
from finetune_trainer.retrieval.html import DEEPEST, TooDeepError, title_and_blocks
from finetune_trainer.sources import Location, explained, files_under, patiently

Result = TypeVar("Result")

FORMS = {".txt": "txt", ".text": "txt", ".md": "md", ".markdown": "md", ".html": "html", ".htm": "html", ".jsonl": "jsonl"}
"""Forms of documents by the file's ending."""
FILE_BYTES = {"txt": 64 << 20, "md": 64 << 20, "html": 16 << 20}
"""Largest file of each form that is read whole."""
TEXT_CHARACTERS = 256 << 20
"""Largest knowledge base; it is held in memory, with its index."""
SHOWN_FAULTS = 5
"""Faulty rows that a message describes; the rest is counted."""
_BLOCK = 1 << 20
TITLE_CHARACTERS = 1000
"""Of the headings above a text that its passages are shown under: each of them repeats it."""
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*(?:[ \t]\"[^\"\n]*\")?\)")


@dataclass(frozen=True)
class Section:
    """Text under one heading, its paragraphs parted by empty lines."""

    title: str
    """The document's title and the headings above the text, the outermost first; may be empty."""
    text: str


@dataclass(frozen=True)
class Document:
    """What belongs together: a file, or a row of a jsonl file."""

    place: str
    """File as the job names it, and the line of a row."""
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class KnowledgeFiles:
    """The files of a knowledge base."""

    location: Location
    field: str
    """The job's field, for messages."""

    def documents(self) -> Iterator[Document]:
        """The documents that hold text, in the order of their names.

        Raises JobError (KnowledgeBaseInvalid, AuthenticationFailed, StorageUnavailable).
        """
        faults, found, characters = _Faults(self.field), 0, 0
        for file, form in self.files()[0]:
            for item in _rows(file, self.field) if form == "jsonl" else [self._whole(file, form)]:
                if isinstance(item, Fault):
                    faults.add(item)
                    continue
                characters += sum(len(section.text) for section in item.sections)
                if characters > TEXT_CHARACTERS:
                    raise self._problem(f"{self.location.uri} holds more than {TEXT_CHARACTERS >> 20} Mi characters: name a part of it")
                if item.sections and not faults.number:
                    found += 1
                    yield item
        faults.check()
        if not found:
            raise self._problem(f"{self.location.uri} holds no text: its documents are empty")

    def files(self) -> tuple[list[tuple[Location, str]], int]:
        """The documents' files with their forms, and how many other files there are. Raises JobError as documents does."""
        try:
            files = patiently(lambda: files_under(self.location))
        except Exception as error:
            raise self._told(explained(error, self.location.uri, Reason.KNOWLEDGE_BASE_INVALID)) from error
        formed = [(file, form) for file in files if (form := _form(file.uri)) is not None]
        if formed:
            return formed, len(files) - len(formed)
        is_file = len(files) == 1 and files[0].uri == self.location.uri
        what = "is no document" if is_file else "holds no document" if files else "is an empty folder"
        raise self._problem(f"{self.location.uri} {what}: documents end in {', '.join(FORMS)}")

    def identity(self) -> list[str]:
        """The form and the content of each document, wherever it is and whatever its name. Raises JobError as documents does."""
        return [f"{form} {self._read(file, _sha256)}" for file, form in self.files()[0]]

    def state(self) -> list[str]:
        """Names, sizes and times of change of the documents: what shows a change and costs nothing. Raises JobError as documents does."""
        return [f"{file.uri} {self._read(file, _size_and_time)}" for file, _ in self.files()[0]]

    def _whole(self, file: Location, form: str) -> Document:
        """A document that is a file."""
        data = self._read(file, lambda file: _beginning(file, FILE_BYTES[form] + 1))
        if len(data) > FILE_BYTES[form]:
            raise self._problem(f"{file.uri} is larger than {FILE_BYTES[form] >> 20} MiB, the most of a {form} document: divide it")
        if b"\0" in data:
            line = data.count(b"\n", 0, data.index(b"\0")) + 1
            raise self._problem(f"{file.uri}, line {line}: the file holds a zero byte: it is no text, or not in UTF-8")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise self._problem(f"{file.uri}, line {line}: the file is not UTF-8 (byte {error.start + 1}): convert it") from error
        try:
            sections = {"txt": _text_sections, "md": _markdown_sections, "html": _html_sections}[form](_with_plain_ends(text))
        except TooDeepError as error:
            raise self._problem(
                f"{file.uri}: the page has tags more than {DEEPEST} deep within each other, as broken pages have"
            ) from error
        return Document(file.uri, tuple(section for section in sections if section.text))

    def _read(self, file: Location, read: Callable[[Location], Result]) -> Result:
        try:
            return patiently(lambda: read(file))
        except Exception as error:
            raise self._told(explained(error, file.uri, Reason.KNOWLEDGE_BASE_INVALID)) from error

    def _problem(self, message: str) -> JobError:
        return JobError(Reason.KNOWLEDGE_BASE_INVALID, f"{self.field}: {message}")

    def _told(self, error: JobError) -> JobError:
        return JobError(error.reason, f"{self.field}: {error.message}")


@dataclass
class _Faults:
    """Rows that cannot be used: the first of them, and their number."""

    field: str
    number: int = 0
    first: tuple[Fault, ...] = ()

    def add(self, fault: Fault) -> None:
        """One more."""
        self.number += 1
        self.first += (fault,) if len(self.first) < SHOWN_FAULTS else ()

    def check(self) -> None:
        """Raise JobError (KnowledgeBaseInvalid) where there is one."""
        if not self.number:
            return
        more = f"; and {self.number - len(self.first)} more" if self.number > len(self.first) else ""
        told = "; ".join(map(str, self.first))
        rows = "row" if self.number == 1 else "rows"
        raise JobError(Reason.KNOWLEDGE_BASE_INVALID, f"{self.field}: {self.number} {rows} cannot be used. {told}{more}")


def _rows(file: Location, field: str) -> Iterator[Document | Fault]:
    """The documents of a jsonl file: rows with a text, and a title where they have one."""
    try:
        for row in read_rows(file):
            yield _row(row) if isinstance(row, Row) else row
    except JobError as error:
        if error.reason not in (Reason.DATASET_INVALID, Reason.DATASET_NOT_FOUND):
            raise JobError(error.reason, f"{field}: {error.message}") from error
        if error.message != f"{file.uri} has no rows":
            raise JobError(Reason.KNOWLEDGE_BASE_INVALID, f"{field}: {error.message}") from error


def _row(row: Row) -> Document | Fault:
    if "text" not in row.columns:
        return Fault(row.place, f"text is missing; the row has {columns_of(row)}")
    text, title = row.columns["text"], row.columns.get("title") or ""
    for name, value in (("text", text), ("title", title)):
        if not isinstance(value, str):
            return Fault(row.place, f"{name} must be a string, not {kind_of(value)}")
    if not text.strip():
        return Fault(row.place, "text is empty")
    return Document(str(row.place), (Section(" ".join(title.split())[:TITLE_CHARACTERS], _with_plain_ends(text).strip()),))


def _form(uri: str) -> str | None:
    return next((form for ending, form in FORMS.items() if uri.lower().endswith(ending)), None)


def _with_plain_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _text_sections(text: str) -> list[Section]:
    return [Section("", text.strip())]


def _html_sections(text: str) -> list[Section]:
    """The blocks between a page's headings."""
    title, blocks = title_and_blocks(text)
    outline = _Outline(title)
    for block in blocks:
        if block.level:
            outline.head(block.level, " ".join(block.text.split()))
        else:
            outline.lines += [block.text, ""]
    return outline.ended()


def _markdown_sections(text: str) -> list[Section]:
    """The text between headings (CommonMark's, of both forms); links and comments leave what a reader sees of them."""
    outline = _Outline("")
    fence = ""
    for line in _without_front_matter(_without_comments(text)).split("\n"):
        mark = _FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        heading = _HEADING.match(line) if not fence else None
        underline = _UNDERLINE.match(line) if not fence and outline.lines and outline.lines[-1].strip() else None
        if heading:
            outline.head(len(heading[1]), _LINK.sub(r"\1", _without_closing(heading[2])))
        elif underline:
            outline.head(1 if underline[1][0] == "=" else 2, outline.lines.pop().strip())
        else:
            outline.lines.append(_LINK.sub(r"\1", line))
    return outline.ended()


class _Outline:
    """Sections as their headings and lines come."""

    def __init__(self, title: str) -> None:
        self.lines: list[str] = []
        """Of the section that is being read."""
        self._titles = [(0, title[:TITLE_CHARACTERS])]
        self._sections: list[Section] = []

    def head(self, level: int, title: str) -> None:
        """A heading ends the section before it, and stands above those of deeper levels."""
        self._end()
        self._titles = [(other, text) for other, text in self._titles if other < level] + [(level, title[:TITLE_CHARACTERS])]

    def ended(self) -> list[Section]:
        """All sections."""
        self._end()
        return self._sections

    def _end(self) -> None:
        titles = list(dict.fromkeys(text for _, text in self._titles if text))
        self._sections.append(Section(" / ".join(titles)[:TITLE_CHARACTERS], "\n".join(self.lines).strip()))
        self.lines.clear()


def _without_closing(heading: str) -> str:
    """A heading's text without the # that may close it. An expression that looks for both ends takes the cube of a line's length."""
    return heading.rstrip(" \t").rstrip("#").rstrip(" \t")


def _without_front_matter(text: str) -> str:
    """Without the block of settings that many Markdown files begin with."""
    end = text.find("\n---\n", 3) if text.startswith("---\n") else -1
    return text[end + 5 :] if end >= 0 else text


def _without_comments(text: str) -> str:
    parts, at = [], 0
    while (start := text.find("<!--", at)) >= 0 and (end := text.find("-->", start + 4)) >= 0:
        parts.append(text[at:start])
        at = end + 3
    return "".join([*parts, text[at:]])


def _beginning(file: Location, size: int) -> bytes:
    with file.filesystem.open(file.path, "rb") as stream:
        return bytes(stream.read(size))


def _sha256(file: Location) -> str:
    digest = hashlib.sha256()
    with file.filesystem.open(file.path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _size_and_time(file: Location) -> str:
    info = file.filesystem.info(file.path)
    return f"{info.get('size')} {info.get('mtime')}"
