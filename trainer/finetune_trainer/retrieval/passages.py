"""Passages: pieces of documents of a bounded number of words, each of which can be understood alone. Pure.

A passage never goes beyond its heading; it ends at the end of a sentence where there is one in its last two fifths, and the next one begins
with its last words. The same text in two places is one passage: repeated notes would take the place of what was to be found.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import regex

from finetune_trainer.retrieval.documents import Document

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^\s{_UNSPACED}]{{1,64}}")
"""What counts as a word: what stands between spaces, up to a length that no word has; a character where a script has no spaces."""
_SENTENCE_END = regex.compile(r"[\p{Sentence_Terminal}\u2026:;][\p{Pe}\p{Pf}\"']*$")
_EARLIEST_END = 0.6
"""Share of its words after which a passage may end with a sentence."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document."""

    place: str
    """File, and line of a row."""
    title: str
    """Headings above it; may be empty."""
    text: str

    @property
    def shown(self) -> str:
        """The passage as it is searched and shown: under its title."""
        return f"{self.title}\n{self.text}" if self.title else self.text


def passages_of(documents: Iterable[Document], words: int, overlap: int) -> Iterator[Passage]:
    """The documents' passages of at most so many words, of which the first `overlap` are the last of the one before; each text once."""
    seen: set[bytes] = set()
    for document in documents:
        for section in document.sections:
            for text in pieces(section.text, words, overlap):
                passage = Passage(document.place, section.title, text)
                name = hashlib.sha256(passage.shown.encode()).digest()[:16]
                if name not in seen:
                    seen.add(name)
                    yield passage


def pieces(text: str, words: int, overlap: int) -> Iterator[str]:
    """The pieces of a text; none of a text without a letter or digit."""
    spans = [match.span() for match in _WORD.finditer(text)]
    start = 0
    while start < len(spans):
        end = _end(text, spans, start, words, overlap)
        piece = text[spans[start][0] : spans[end - 1][1]]
        if any(character.isalnum() for character in piece):
            yield piece
        if end == len(spans):
            return
        start = end - overlap


def _end(text: str, spans: list[tuple[int, int]], start: int, words: int, overlap: int) -> int:
    """The word that a piece ends before: after its last sentence, if that is late enough and leaves the next piece something new."""
    full = start + words
    if full >= len(spans):
        return len(spans)
    earliest = start + max(overlap + 1, round(words * _EARLIEST_END))
    for end in range(full, earliest - 1, -1):
        if "\n\n" in text[spans[end - 1][1] : spans[end][0]] or _SENTENCE_END.search(text, spans[end - 1][0], spans[end - 1][1]):
            return end
    return full
