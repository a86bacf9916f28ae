"""Whether a task of lm-evaluation-harness would run what a model writes, though its settings do not say so. Imports nothing of a task.

Some tasks score an answer with `eval`, or with sympy's `parse_expr`, which is as much: whoever made the model would be at home in the
worker, beside its Secrets. So the task's own files are looked through, with those that they name.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

_RUNS = re.compile(r"(?<![\w.])(?:exec|eval|parse_expr|sympify|Popen)\(|\bsubprocess\.\w|\bos\.system\(|\bcode_eval\b")
_NAMED = re.compile(r"\blm_eval\.tasks\.([\w.]+)")
_PACKAGE = "lm_eval"


def program_in(task: Any) -> Path | None:  # noqa: ANN401 - lm-eval has no types
    """The first file of a task's own code that may run a text; None where there is none."""
    left, seen = list(dict.fromkeys(_files(task))), set[Path]()
    while left:
        file = left.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        text = file.read_text(encoding="utf-8", errors="replace")
        if _RUNS.search(text):
            return file
        left += [other for other in file.parent.glob("*.py") if re.search(rf"\b{re.escape(other.stem)}\b", text)]
        left += _elsewhere(file, text)
    return None


def _files(task: Any) -> Iterator[Path]:  # noqa: ANN401 - lm-eval has no types
    """The files of the functions that a task's settings name, and of its class where that is its own."""
    for kind in type(task).__mro__:
        if not kind.__module__.startswith(f"{_PACKAGE}.api") and kind.__module__.partition(".")[0] not in sys.stdlib_module_names:
            yield Path(inspect.getfile(kind))
    settings = getattr(task, "config", None)
    for function in _functions(vars(settings) if hasattr(settings, "__dict__") else settings):
        file = Path(function.__code__.co_filename)
        if "api" not in file.parts[-3:-1]:  # the harness's own metrics
            yield file


def _functions(value: object) -> Iterator[FunctionType]:
    """All functions in settings, however deep; those that are partly called, too."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _functions(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _functions(item)
    elif inner := getattr(value, "func", None):
        yield from _functions(inner)


def _elsewhere(file: Path, text: str) -> Iterator[Path]:
    """The files of other tasks that a task's file imports: from lm_eval.tasks.other.utils import ..."""
    root = next((parent for parent in file.parents if parent.name == "tasks" and parent.parent.name == _PACKAGE), None)
    if root is None:
        return
    for match in _NAMED.finditer(text):
        place = root.joinpath(*match[1].rstrip(".").split("."))
        yield from (place.with_suffix(".py"), place / "__init__.py")
