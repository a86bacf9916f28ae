"""Texts of users and models as Markdown shows them: as what they are, whatever they hold. Pure.

A prompt, an answer or a file's name may hold Markdown, HTML, links to anywhere or a terminal's commands; a report is read in browsers.
"""

import re
import textwrap

from finetune_api.scrub import scrub

WIDTH = 110
"""Characters in a line of a quoted text, so that it can be printed."""
_LINE_BREAKS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_MARKUP = re.compile(r"[\\`*_\[\]|~$#<>&@]|:(?=//)|(?<=\bwww)\.", re.IGNORECASE)
"""What means something within a line, and what programs make links of even where nothing marks it as such."""
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", ":": "&#58;", "@": "&#64;", ".": "&#46;"}


def inline(text: str, most: int = 200) -> str:
    """A text within a line or a table's cell, but not at its beginning; at most so many characters of it."""
    return _MARKUP.sub(lambda match: _ENTITIES.get(match[0], "\\" + match[0]), clipped(_one_line(text), most))


def code(text: str, most: int = 200) -> str:
    """A name as code within a line or a table's cell."""
    plain = clipped(_one_line(text), most)
    return inline(plain) if not plain or "`" in plain or "|" in plain else f"`{plain}`"


def block(text: str, most: int = 1500, language: str = "text") -> str:
    """A text in a block of its own, at most so many characters of it, its lines broken where they are too long."""
    lines = scrub(_LINE_BREAKS.sub("\n", clipped(text, most))).expandtabs(4).split("\n")
    wrapped = [part for line in lines for part in _parts(line)]
    longest = max((len(run) for line in wrapped for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence + language, *wrapped, fence])


def clipped(text: str, most: int) -> str:
    """The text, or its beginning with a sign that there was more."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _one_line(text: str) -> str:
    return " ".join(scrub(_LINE_BREAKS.sub(" ", text)).split())


def _parts(line: str) -> list[str]:
    """A line broken between words, or within one that is longer than a line."""
    return textwrap.wrap(line, WIDTH, replace_whitespace=False, drop_whitespace=False, break_on_hyphens=False) or [""]
