"""What a generator is told, and what is read out of what it writes. Pure.

Models number their lines, put them in bold, greet, and repeat themselves, whatever they were told: what is not a point or a pair is passed
over.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune_trainer.retrieval import Passage

POINTS_MAX = 64
"""Points of one output at most."""
LINE_MAX = 1000
"""Characters of a point at most; what is longer is no point."""
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_BULLET = re.compile(r"^(?:[-*+\u2022\u2013\u2014\u00b7]+|\(?\d{1,3}[.)])\s+")
_MARKS = re.compile(r"\*\*|__|`|\[\d{1,3}\]")
"""Bold, code, and the number of a passage as some models cite it."""
_LABEL = re.compile(r"^\W*(?:\d{1,3}[.)]\W*)?(?P<label>question|answer|q|a)\s*(?:\d{1,3}\s*)?[:.)]\W*?(?P<rest>[^\s*].*)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A question with its answer."""

    question: str
    answer: str


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with each {name} that has a value in its place. A value is taken as it is, braces and all."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def numbered(passages: Sequence[Passage]) -> str:
    """Passages as a generator is shown several of them."""
    return "\n\n".join(f"[{number}] {passage.shown}" for number, passage in enumerate(passages, 1))


def points_in(text: str) -> list[str]:
    """The points that a text lists, one a line, each once."""
    points: dict[str, None] = {}
    for line in text.splitlines():
        point = _plain(_BULLET.sub("", line.strip()))
        if any(character.isalpha() for character in point) and len(point) <= LINE_MAX:
            points[point] = None
    return list(points)[:POINTS_MAX]


def pairs_in(text: str) -> list[Pair]:
    """The pairs that a text lists as `Question: ...` and `Answer: ...`, or Q and A, numbered or not; an answer may have several lines."""
    pairs: list[Pair] = []
    question, answer, hears = "", list[str](), ""
    for line in [*text.splitlines(), "Question:"]:
        label = _LABEL.match(line)
        if label is None:
            answer += [line] if hears == "a" else []
            continue
        hears = label["label"][0].lower()
        rest = _plain(label["rest"] or "")
        if hears == "q":
            said = _plain("\n".join(answer))
            if question and said:
                pairs.append(Pair(question, said))
            question, answer = rest, []
        else:
            answer = [rest]
    return pairs


def _plain(text: str) -> str:
    return _MARKS.sub("", text).strip()
