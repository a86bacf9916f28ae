"""A suite's examples as they are asked, and what a candidate makes of them: plain values and their files. Pure but for reading and writing.

    suites/<suite>.jsonl                   a Case a line
    answers/<candidate>/<suite>.jsonl      an Answered a line, complete or not there

A candidate is what is measured: `baseline` (the untuned model, asked as the data has it), `prompt-<name>`, `model-<name>`, or `step-<n>`
(the model as it was after that step).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

BASELINE = "baseline"
"""The candidate that others are compared with."""


@dataclass(frozen=True)
class Case:
    """One example of a suite, as it is asked: a plain prompt, or the conversation before the answer."""

    id: str
    """Stable within the suite."""
    reference: str
    """The golden answer; empty where there is none, as in plain text."""
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    place: str = ""
    """File and line, for a message."""


@dataclass(frozen=True)
class Answered:
    """What a candidate made of a case."""

    id: str
    text: str = ""
    """What it said; empty where nothing was generated."""
    loss: float = 0.0
    """Sum of the losses of the reference's tokens, in nats."""
    labels: int = 0
    """Tokens of the reference; 0 where its loss was not measured."""
    correct: int = 0
    """Tokens of the reference that it found the most probable in their place."""


Value = TypeVar("Value", Case, Answered)


def written(values: Iterable[Case | Answered]) -> Iterator[str]:
    """A line of JSON for each, with its end."""
    for value in values:
        yield json.dumps({name: item for name, item in asdict(value).items() if item not in (None, (), [])}, ensure_ascii=False) + "\n"


def read(lines: Iterable[str], kind: type[Value]) -> Iterator[Value]:
    """The values of such lines. Raises ValueError, TypeError or KeyError where they are not."""
    known = {field.name for field in fields(kind)}
    for line in lines:
        found = {name: tuple(item) if isinstance(item, list) else item for name, item in json.loads(line).items() if name in known}
        yield kind(**found)
