"""Examples as they are asked: prompt or conversation, and the golden answer; a line of JSON each. Pure."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, cast


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


Value = TypeVar("Value")
"""A dataclass of texts, numbers and tuples of objects."""


def written(values: Iterable[Any]) -> Iterator[str]:
    """A line of JSON for each dataclass, with its end."""
    for value in values:
        yield json.dumps({name: item for name, item in asdict(value).items() if item not in (None, (), [])}, ensure_ascii=False) + "\n"


def read(lines: Iterable[str], kind: type[Value]) -> Iterator[Value]:
    """The values of such lines. Raises ValueError, TypeError or KeyError where they are not."""
    known = {field.name for field in fields(cast("Any", kind))}
    for line in lines:
        found = {name: tuple(item) if isinstance(item, list) else item for name, item in json.loads(line).items() if name in known}
        yield kind(**found)
