"""Regular expressions of users, searched for in texts of models: neither side can be trusted with Python's own engine, which may never end.

Rust's regex crate, which pydantic brings, takes time in proportion to the text for any pattern. It refuses what it could not do so
(look-around, back references) and what compiles to more than ten mebibytes.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError


def searcher(pattern: str) -> Callable[[str], bool]:
    """From a text to whether the pattern is found somewhere in it; ^ and $ are its ends. Raises ValueError with what is wrong with it."""
    try:
        adapter = TypeAdapter(Annotated[str, StringConstraints(pattern=pattern)])
    except (SchemaError, UnicodeEncodeError) as error:
        raise ValueError(_reason(str(error))) from None

    def found(text: str) -> bool:
        try:
            adapter.validate_python(text.encode("utf-8", "replace").decode())  # without halves of characters, which JSON may hold
        except ValidationError:
            return False
        return True

    return found


def check_pattern(pattern: str) -> str:
    """The pattern, if it can be searched for. Raises ValueError."""
    if (problem := _problem(pattern)) is not None:
        raise ValueError(f"must be a regular expression without look-around and back references: {problem}")
    return pattern


@lru_cache(maxsize=4096)
def _problem(pattern: str) -> str | None:
    """What is wrong with a pattern. Remembered: a large one takes 0.3 s, and the operator reads a job whenever something of it changes."""
    try:
        searcher(pattern)
    except ValueError as error:
        return str(error)
    return None


def _reason(message: str) -> str:
    """The sentence at the end: before it stand the pattern and a mark below it."""
    return message.strip().splitlines()[-1].strip().removeprefix("error: ").removeprefix("SchemaError: ").rstrip(".")
