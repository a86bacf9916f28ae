"""HTML as text: what a reader sees of it, with its headings told apart. Pure.

The page is read as a stream of tags, not as a tree, which takes a time and a memory that grow with its length alone, up to a depth that is
bounded: for a tag that closes nothing, every open one is looked at.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

_UNSEEN = frozenset({"script", "style", "template", "noscript", "svg", "math", "head", "iframe", "object", "select", "textarea", "button"})
_MENUS = frozenset({"nav", "footer", "aside"})
"""Parts that are on every page of a site."""
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
# fmt: off
_INLINE = frozenset({
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "img", "ins", "kbd",
    "label", "mark", "q", "ruby", "rb", "rt", "rp", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u",
    "var", "wbr",
})
# fmt: on
_CELLS = frozenset({"td", "th"})
DEEPEST = 1000
"""Tags within each other; browsers give up at some hundred."""
_FED = 1 << 16
"""Bytes that are read before the depth is looked at."""


class TooDeepError(Exception):
    """A page whose tags stand deeper within each other than DEEPEST."""


@dataclass
class Block:
    """A paragraph, or a heading of level 1 to 6."""

    text: str
    level: int = 0


def title_and_blocks(content: str) -> tuple[str, list[Block]]:
    """The page's title, which may be empty, and what it shows. HTML that is broken is read as browsers do. Raises TooDeepError."""
    from lxml import etree

    reader = _Reader()
    parser = etree.HTMLParser(target=reader, encoding="utf-8", huge_tree=True)
    data = content.encode()
    for start in range(0, len(data), _FED):
        parser.feed(data[start : start + _FED])
        if reader.deepest > DEEPEST:
            raise TooDeepError
    if data:
        parser.close()
    return _one_line(reader.title), [block for block in reader.blocks() if block.text]


@dataclass
class _Reader:
    """What lxml calls for each tag and text."""

    _title: list[str] = field(default_factory=list)
    _blocks: list[Block] = field(default_factory=lambda: [Block("")])
    _texts: list[str] = field(default_factory=list)
    """Of the block that is being read."""
    _unseen: list[str] = field(default_factory=list)
    """Open tags within a part that is not seen, that part first."""
    _preformatted: int = 0
    _depth: int = 0
    deepest: int = 0
    """Tags within each other, at most."""

    def start(self, tag: str, attributes: object) -> None:
        """A tag opens."""
        self._depth += 1
        self.deepest = max(self.deepest, self._depth)
        if self._unseen or tag in _UNSEEN or tag in _MENUS:
            self._unseen.append(tag)
        elif tag == "br":
            self._texts.append("\n")
        elif tag in _CELLS:
            self._texts.append(" | " if any(text.strip() for text in self._texts) else " ")
        elif tag not in _INLINE:
            self._preformatted += tag == "pre"
            self._end_block(_HEADINGS.get(tag, 0))

    def end(self, tag: str) -> None:
        """A tag closes."""
        self._depth -= 1
        if self._unseen:
            if tag in self._unseen:
                while self._unseen.pop() != tag:
                    pass
        elif tag not in _INLINE and tag not in _CELLS and tag != "br":
            self._end_block(0)
            self._preformatted -= tag == "pre"

    def data(self, text: str) -> None:
        """Text between tags."""
        if self._unseen == ["head", "title"]:
            self._title.append(text)
        elif not self._unseen:
            self._texts.append(text if self._preformatted > 0 else text.replace("\n", " "))

    def comment(self, text: str) -> None:
        """Not seen."""

    def pi(self, target: str, data: str | None = None) -> None:
        """Not seen."""

    def close(self) -> None:
        """The page ends."""
        self._end_block(0)

    @property
    def title(self) -> str:
        """The page's title."""
        return "".join(self._title)

    def blocks(self) -> Iterator[Block]:
        """What was read."""
        return iter(self._blocks)

    def _end_block(self, level: int) -> None:
        """The text so far is a block; what follows is of this level."""
        lines = (_one_line(line) for line in "".join(self._texts).split("\n"))
        self._blocks[-1].text = "\n".join(line for line in lines if line)
        if self._blocks[-1].text:
            self._blocks.append(Block(""))
        self._blocks[-1].level = level
        self._texts.clear()


def _one_line(text: str) -> str:
    return " ".join(text.split())
