"""Examples as they are asked: prompt or conversation, and the golden answer; a line of JSON each.

A folder of prepared data has `<split>-cases.jsonl` for the splits that are asked: validation, test and suites, where the job has suites or
a baseline; and TRAIN_CASES of the training examples where a baseline's prompt shows some.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt

from finetune_api.reasons import Reason
from finetune_trainer.data.formats import Conversation, Example, Preference, PromptCompletion
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location, explained, patiently

TRAIN_CASES = 2000
"""Training examples at most from which a prompt's are chosen."""
_STREAM = 6
"""Stream of random numbers that these are drawn from."""


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
    turn: Mapping[str, Any] | None = None
    """The golden answer as the conversation has it, where it calls tools."""


_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""What JSON leaves as it is and a reader may take for the end of a line."""
Value = TypeVar("Value")
"""A dataclass of texts, numbers and tuples of objects."""


def written(values: Iterable[Any]) -> Iterator[str]:
    """A line of JSON for each dataclass, with its end."""
    for value in values:
        line = json.dumps({name: item for name, item in vars(value).items() if item not in (None, (), [])}, ensure_ascii=False)
        yield line.translate(_BREAKS) + "\n"


def read(lines: Iterable[str], kind: type[Value]) -> Iterator[Value]:
    """The values of such lines, empty ones left out. Raises ValueError, TypeError or KeyError where they are not."""
    known = {field.name for field in fields(cast("Any", kind))}
    for line in filter(None, lines):
        found = {name: tuple(item) if isinstance(item, list) else item for name, item in json.loads(line).items() if name in known}
        yield kind(**found)


def case_of(example: Example, name: str) -> Case:
    """An example as it is asked: a conversation before its last answer, a preference's prompt with the better answer as the golden one.

    A plain text is a prompt without an answer. An answer that is all tool calls is their JSON.
    """
    if isinstance(example, Preference):
        return case_of(example.chosen, name)
    if isinstance(example, PromptCompletion):
        return Case(name, example.completion, example.prompt, place=str(example.place))
    if not isinstance(example, Conversation):
        return Case(name, "", example.text, place=str(example.place))
    last = max(index for index, turn in enumerate(example.messages) if turn["role"] == "assistant")
    before = example.messages[:last]
    answer = example.messages[last]
    turn = answer if answer.get("tool_calls") else None
    return Case(name, _said(answer), None if before else "", before, example.tools, str(example.place), turn)


def _said(turn: Mapping[str, Any]) -> str:
    """The text of an answer."""
    content = turn.get("content")
    text = "".join(part["text"] for part in content) if isinstance(content, list) else content
    return text or json.dumps(turn.get("tool_calls") or [], ensure_ascii=False)


def cases_file(split: str) -> str:
    """Name of a split's file of cases."""
    return f"{split}-cases.jsonl"


class CaseWriter:
    """A split's cases, growing, numbered in their order. A context. Where they are not wanted, there is no file. Raises OSError."""

    def __init__(self, folder: Path, split: str, *, wanted: bool) -> None:
        self.wanted = wanted
        self._file: IO[str] | None = (folder / cases_file(split)).open("w", encoding="utf-8") if wanted else None
        self._count = 0

    def add(self, case: Case) -> None:
        """One more, whose name becomes its number."""
        if self._file is not None:
            self._file.writelines(written([replace(case, id=f"{self._count:06d}")]))
            self._count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


def divide_cases(folder: Path, split: str, sides: npt.NDArray[np.int8], into: Mapping[int, str]) -> None:
    """Divide a split's cases as its examples are: those of each side [N] go to the split of that name; other sides' go."""
    writers = {side: CaseWriter(folder, name, wanted=True) for side, name in into.items()}
    with (folder / cases_file(split)).open(encoding="utf-8") as lines:
        for line, side in zip(lines, sides.tolist(), strict=True):
            if side in writers:
                writers[side].add(next(read([line], Case)))
    for writer in writers.values():
        writer.__exit__(None, None, None)
    (folder / cases_file(split)).unlink()


def some_to_show(sides: npt.NDArray[np.int8], side: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which of a side's examples prompts may show: bool [N], TRAIN_CASES of them by the seed."""
    places = np.flatnonzero(sides == side)
    drawn = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, _STREAM])).permutation(len(places))[:TRAIN_CASES]
    chosen = np.zeros(len(sides), np.bool_)
    chosen[places[drawn]] = True
    return chosen


def read_cases(folder: Location, split: str) -> list[Case]:
    """The cases of a split of a prepared folder (`suite-<name>` is a suite's own); none where it has none.

    Raises JobError (StorageUnavailable).
    """
    path, uri = f"{folder.path}/{cases_file(split)}", f"{folder.uri}/{cases_file(split)}"
    try:
        with patiently(lambda: folder.filesystem.open(path, "rb")) as file:
            return list(read(file.read().decode().split("\n"), Case))
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise JobError(Reason.STORAGE_UNAVAILABLE, f"{uri} is not as it was written: {error}") from error
    except OSError as error:
        raise explained(error, uri, Reason.STORAGE_UNAVAILABLE) from error
