"""From rows to examples: what a row must hold in each format, with a fault that names the field where it does not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, TypeVar

from finetune_trainer.data.rows import Fault, Place, Row, columns_of, kind_of

Format = Literal["messages", "promptCompletion", "text", "preference"]
NEEDED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "promptCompletion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
}
"""Fields of each format that a row must have. A preference may also have its prompt, or hold it where its answers begin."""
Turns = tuple[dict[str, Any], ...]
_Part = TypeVar("_Part")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Turns, written with the model's chat template."""

    place: Place
    messages: Turns
    tools: Turns = ()
    prompt_turns: int | None = None
    """Turns that are given, in an answer of a preference: every assistant turn after them counts, and none before."""


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


@dataclass(frozen=True)
class Preference:
    """One prompt with two answers, the first of which is the better one."""

    place: Place
    chosen: Conversation | PromptCompletion
    rejected: Conversation | PromptCompletion


Example = Conversation | PromptCompletion | Text | Preference


def detect_format(row: Row, columns: Mapping[str, str], *, preferences: bool = False) -> Format | Fault:
    """The format whose columns the row has; messages before promptCompletion before text.

    `preferences` says whether the objective learns from those: then it is no other format, since such data often has messages too.
    """
    formats = {format_: fields for format_, fields in NEEDED.items() if preferences is (format_ == "preference")}
    for format_, fields in formats.items():
        if all(columns.get(field, field) in row.columns for field in fields):
            return format_
    wanted = " or ".join("+".join(columns.get(field, field) for field in fields) for fields in formats.values())
    problem = f"the columns are {columns_of(row)}, not {wanted}"
    if preferences:
        problem += ", which objective.dpo learns from"
    others = [fields for format_, fields in NEEDED.items() if format_ not in formats]
    if any(all(columns.get(field, field) in row.columns for field in fields) for fields in others):
        these = (
            "examples for objective.sft or objective.distillation" if preferences else "preferences, which only objective.dpo learns from"
        )
        return Fault(row.place, f"{problem}: these are {these}")
    return Fault(row.place, f"{problem}; data.columns can rename them")


def example_from(row: Row, format_: Format, columns: Mapping[str, str]) -> Example | Fault:
    """The row as an example, or what is wrong with it. `columns` names the data's own columns by field."""
    has_prompt = format_ == "preference" and "prompt" in columns  # not needed, but where it is named it is to be there
    for field in (*NEEDED[format_], *(["prompt"] if has_prompt else [])):
        name = columns.get(field, field)
        if name not in row.columns:
            return Fault(row.place, f"the column {name} is missing; the row has {columns_of(row)}")
    if format_ == "messages":
        return _conversation(row, columns.get("messages", "messages"))
    if format_ == "preference":
        return _preference(row, {field: columns.get(field, field) for field in ("prompt", "chosen", "rejected")})
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
    problem = _messages_problem(messages, name) or _tools_problem(row)
    if problem is None and not _has_answer(messages):
        problem = f"{name} has no assistant turn to learn from"
    return Fault(row.place, problem) if problem else Conversation(row.place, _turns(messages), _tools(row))


def _preference(row: Row, names: Mapping[str, str]) -> Preference | Fault:
    """Two answers to one prompt, which has a column of its own or is what both begin with."""
    chosen, rejected = row.columns[names["chosen"]], row.columns[names["rejected"]]
    for name, answer in ((names["chosen"], chosen), (names["rejected"], rejected)):
        if not isinstance(answer, (str, list)):
            return Fault(row.place, f"{name} must be a string or an array of messages, not {kind_of(answer)}")
        if not (answer.strip() if isinstance(answer, str) else answer):
            return Fault(row.place, f"{name} is empty")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _preferred_text(row, names, chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _preferred_turns(row, names, chosen, rejected)
    return Fault(row.place, f"{names['chosen']} is {kind_of(chosen)}, {names['rejected']} {kind_of(rejected)}; both must be of one kind")


def _preferred_text(row: Row, names: Mapping[str, str], chosen: str, rejected: str) -> Preference | Fault:
    """Two texts after a prompt. What they both begin with may stand for it: the model gives that the same probability in both."""
    prompt = row.columns.get(names["prompt"])
    if chosen == rejected:
        return Fault(row.place, _same(names))
    if prompt is None:
        prompt = "".join(character for character, _ in _shared(chosen, rejected))
        chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    elif not isinstance(prompt, str):
        return Fault(row.place, f"{names['prompt']} must be a string like {names['chosen']}, not {kind_of(prompt)}")
    return Preference(row.place, PromptCompletion(row.place, prompt, chosen), PromptCompletion(row.place, prompt, rejected))


def _preferred_turns(row: Row, names: Mapping[str, str], chosen: list[Any], rejected: list[Any]) -> Preference | Fault:
    """Two conversations: after a prompt that is one too, or with the prompt as the turns that both begin with."""
    prompt = row.columns.get(names["prompt"])
    problem = _messages_problem(chosen, names["chosen"]) or _messages_problem(rejected, names["rejected"]) or _tools_problem(row)
    if problem is None and isinstance(prompt, list) and prompt:
        problem = _messages_problem(prompt, names["prompt"])
    if problem:
        return Fault(row.place, problem)
    given, left, right = _turns(prompt) if isinstance(prompt, list) else (), _turns(chosen), _turns(rejected)
    if left == right:
        return Fault(row.place, _same(names))
    shared = tuple(turn for turn, _ in _shared(left, right))
    if not given and not shared:
        lacking = "is missing" if prompt is None else "holds no messages"
        both = f"{names['chosen']} and {names['rejected']}"
        return Fault(row.place, f"{names['prompt']} {lacking}, and {both} begin with no turn in common that could stand for it")
    if not given or given == shared[: len(given)]:  # some data sets repeat the prompt in the answers
        given, left, right = shared, left[len(shared) :], right[len(shared) :]
    for name, turns in ((names["chosen"], left), (names["rejected"], right)):
        if not _has_answer(turns):
            return Fault(row.place, f"{name} has no assistant turn of its own to learn from")
    return Preference(row.place, *(Conversation(row.place, given + turns, _tools(row), len(given)) for turns in (left, right)))


def _same(names: Mapping[str, str]) -> str:
    return f"{names['chosen']} and {names['rejected']} are the same, so neither is better"


def _shared(one: Sequence[_Part], other: Sequence[_Part]) -> Iterator[tuple[_Part, _Part]]:
    """What both begin with, twice."""
    return takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))


def _messages_problem(messages: object, name: str) -> str | None:
    """What is wrong with the messages of a column; None where nothing is."""
    if not isinstance(messages, list):
        return f"{name} must be an array, not {kind_of(messages)}"
    if not messages:
        return f"{name} is empty"
    problems = ((index, _message_problem(message)) for index, message in enumerate(messages))
    return next((f"{name}[{index}]{problem}" for index, problem in problems if problem), None)


def _tools_problem(row: Row) -> str | None:
    tools = row.columns.get("tools") or []
    is_fine = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    return None if is_fine else "tools must be an array of objects"


def _tools(row: Row) -> Turns:
    return tuple(row.columns.get("tools") or ())


def _turns(messages: list[dict[str, Any]]) -> Turns:
    """Columnar files give every message every key; templates take a key that is there for one that is meant."""
    return tuple({key: value for key, value in message.items() if value is not None} for message in messages)


def _has_answer(turns: Sequence[dict[str, Any]]) -> bool:
    return any(turn["role"] == "assistant" for turn in turns)


def _message_problem(message: object) -> str | None:
    """What is wrong with a message, as the rest of a sentence that begins with its index; None where nothing is."""
    if not isinstance(message, dict):
        return f" must be an object, not {kind_of(message)}"
    role = message.get("role")
    if not isinstance(role, str):
        return ".role is missing" if role is None else f".role must be a string, not {kind_of(role)}"
    if role not in ROLES:
        return f".role is {role[:40]!r}, not one of {', '.join(ROLES)}"
    calls_tools = role == "assistant" and bool(message.get("tool_calls"))
    problem = _content_problem(message.get("content"), learnt=role == "assistant" and not calls_tools)
    return f".content {problem}" if problem and not (calls_tools and not message.get("content")) else None


def _content_problem(content: object, *, learnt: bool) -> str | None:
    if isinstance(content, list) and not (content and all(_is_text_part(part) for part in content)):
        return "may hold parts of type text only"
    if isinstance(content, (str, list)):
        return "is empty, so there is nothing to learn from" if learnt and _is_blank(content) else None
    return "is missing" if content is None else f"must be a string, not {kind_of(content)}"


def _is_blank(content: str | list[dict[str, Any]]) -> bool:
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return not any(text.strip() for text in texts)


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
