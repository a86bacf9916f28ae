"""From rows to examples: what a row must hold in each format, with a fault that names the field where it does not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune_trainer.data.rows import Fault, Place, Row, kind_of

Format = Literal["messages", "promptCompletion", "text"]
NEEDED: dict[Format, tuple[str, ...]] = {"messages": ("messages",), "promptCompletion": ("prompt", "completion"), "text": ("text",)}
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Turns, written with the model's chat template."""

    place: Place
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and how it goes on."""

    place: Place
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text."""

    place: Place
    text: str


Example = Conversation | PromptCompletion | Text


def detect_format(row: Row, columns: Mapping[str, str]) -> Format | Fault:
    """The format whose columns the row has; messages before promptCompletion before text."""
    for format_, fields in NEEDED.items():
        if all(columns.get(field, field) in row.columns for field in fields):
            return format_
    wanted = " or ".join("+".join(columns.get(field, field) for field in fields) for fields in NEEDED.values())
    return Fault(row.place, f"the columns are {_names(row)}, not {wanted}; data.columns can rename them")


def example_from(row: Row, format_: Format, columns: Mapping[str, str]) -> Example | Fault:
    """The row as an example, or what is wrong with it. `columns` names the data's own columns by field."""
    for field in NEEDED[format_]:
        name = columns.get(field, field)
        if name not in row.columns:
            return Fault(row.place, f"the column {name} is missing; the row has {_names(row)}")
    if format_ == "messages":
        return _conversation(row, columns.get("messages", "messages"))
    values = []
    for field in NEEDED[format_]:
        name = columns.get(field, field)
        value = row.columns[name]
        if not isinstance(value, str):
            return Fault(row.place, f"{name} must be a string, not {kind_of(value)}")
        if not value.strip() and field != "prompt":
            return Fault(row.place, f"{name} is empty")
        values.append(value)
    return PromptCompletion(row.place, *values) if format_ == "promptCompletion" else Text(row.place, *values)


def _conversation(row: Row, name: str) -> Conversation | Fault:
    messages = row.columns[name]
    if not isinstance(messages, list):
        return Fault(row.place, f"{name} must be an array, not {kind_of(messages)}")
    if not messages:
        return Fault(row.place, f"{name} is empty")
    for index, message in enumerate(messages):
        problem = _message_problem(message)
        if problem:
            return Fault(row.place, f"{name}[{index}]{problem}")
    if not any(message["role"] == "assistant" for message in messages):
        return Fault(row.place, f"{name} has no assistant turn to learn from")
    tools = row.columns.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return Fault(row.place, "tools must be an array of objects")
    return Conversation(row.place, tuple(_without_null(message) for message in messages), tuple(tools))


def _message_problem(message: object) -> str | None:
    """What is wrong with a message, as the rest of a sentence that begins with its index; None where nothing is."""
    if not isinstance(message, dict):
        return f" must be an object, not {kind_of(message)}"
    role = message.get("role")
    if not isinstance(role, str):
        return ".role is missing" if role is None else f".role must be a string, not {kind_of(role)}"
    if role not in ROLES:
        return f".role is {role[:40]!r}, not one of {', '.join(ROLES)}"
    problem = _content_problem(message.get("content"), learnt=role == "assistant")
    calls_tools = role == "assistant" and bool(message.get("tool_calls"))
    return f".content {problem}" if problem and not (calls_tools and not message.get("content")) else None


def _content_problem(content: object, *, learnt: bool) -> str | None:
    if isinstance(content, str):
        return "is empty, so there is nothing to learn from" if learnt and not content.strip() else None
    if isinstance(content, list):
        return None if content and all(_is_text_part(part) for part in content) else "may hold parts of type text only"
    return "is missing" if content is None else f"must be a string, not {kind_of(content)}"


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _without_null(message: dict[str, Any]) -> dict[str, Any]:
    """Columnar files give every message every key; templates take a key that is there for one that is meant."""
    return {key: value for key, value in message.items() if value is not None}


def _names(row: Row) -> str:
    return ", ".join(list(row.columns)[:20]) or "none"
