"""The words of a text as retrieval compares them: without case, ending and form of writing. Pure.

Which language a text is in is told by how many of its words are on the list of the language's most frequent ones. It decides which words
say nothing of what a text is about, and how an ending is cut off (Snowball, Porter 2001). Scripts that put no space between words are
compared by pairs of neighbouring characters.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import regex

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_TERM = regex.compile(
    rf"(?P<number>\p{{Nd}}+(?:[.,:]\p{{Nd}}+)+)|(?P<unspaced>[{_UNSPACED}\p{{M}}]+)|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+", regex.V1
)
_PLAIN = re.compile(r"[0-9]+(?:[.,:][0-9]+)+|[a-z0-9]+")
"""The same for ASCII in small letters, five times as fast."""
_THOUSANDS = regex.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_LONGEST = 64
"""Characters of a word that are looked at; a longer one is no word but data."""
_LISTS = {
    "english": "STOPWORDS_EN_PLUS",
    "german": "STOPWORDS_GERMAN",
    "dutch": "STOPWORDS_DUTCH",
    "french": "STOPWORDS_FRENCH",
    "spanish": "STOPWORDS_SPANISH",
    "portuguese": "STOPWORDS_PORTUGUESE",
    "italian": "STOPWORDS_ITALIAN",
    "russian": "STOPWORDS_RUSSIAN",
    "swedish": "STOPWORDS_SWEDISH",
    "norwegian": "STOPWORDS_NORWEGIAN",
    "danish": "STOPWORDS_DANISH",
    "turkish": "STOPWORDS_TURKISH",
}
_SAMPLE = 500
"""Texts that are looked at to tell the language."""
_ENOUGH = 0.2
"""Share of frequent words from which a language is told; running text of these languages has a third and more."""


def terms(text: str) -> list[str]:
    """The words in their order, as they are written but for case and form of writing; numbers without commas between thousands."""
    if text.isascii():
        return [_THOUSANDS.sub("", word) if "," in word else word[:_LONGEST] for word in _PLAIN.findall(text.lower())]
    found = []
    for match in _TERM.finditer(unicodedata.normalize("NFKC", text).casefold()):
        word = match[0]
        if match["unspaced"]:
            found += [word[at : at + 2] for at in range(max(1, len(word) - 1))]
        elif match["number"]:
            found.append(_THOUSANDS.sub("", word))
        else:
            found.append(word[:_LONGEST])
    return found


@dataclass(frozen=True)
class Language:
    """What is known of a language; of an unknown one, nothing."""

    name: str = ""
    stop_words: frozenset[str] = frozenset()
    """Words that say nothing of what a text is about."""
    _stems: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def content(self, text: str) -> list[str]:
        """The words that say what a text is about, without their endings."""
        return self._without_endings([word for word in terms(text) if word not in self.stop_words])

    def stems(self, text: str) -> list[str]:
        """The words of a text that say what it is about, or all its words where none does; without their endings."""
        return self.content(text) or self._without_endings(terms(text))

    def _without_endings(self, words: list[str]) -> list[str]:
        if not self.name:
            return words
        if new := list({word for word in words if word not in self._stems}):
            self._stems.update(zip(new, _stemmer(self.name).stemWords(new), strict=True))
        return [self._stems[word] for word in words]


def language_of(texts: Sequence[str]) -> Language:
    """The language that most of a sample of the texts is in."""
    step = max(1, len(texts) // _SAMPLE)
    counts = Counter(word for text in texts[::step] for word in terms(text))
    lists = {name: _stop_words(name) for name in _LISTS}
    shares = {name: _share(counts, words) for name, words in lists.items()}
    best = max(shares, key=lambda name: shares[name])
    return Language(best, lists[best]) if shares[best] >= _ENOUGH else Language()


def _share(counts: Counter[str], words: Iterable[str]) -> float:
    return sum(counts[word] for word in words) / max(1, counts.total())


@cache
def _stop_words(language: str) -> frozenset[str]:
    from bm25s import stopwords

    return frozenset(part for word in getattr(stopwords, _LISTS[language]) for part in terms(word))


@cache
def _stemmer(language: str) -> Any:  # noqa: ANN401 - of a library without types
    import Stemmer

    return Stemmer.Stemmer(language)
