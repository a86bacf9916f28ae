import pytest

from finetune_trainer.data.formats import Conversation, Fault, Format, PromptCompletion, Text, detect_format, example_from
from finetune_trainer.data.rows import Place, Row

HERE = Place("train.jsonl", 7)
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def row(**columns: object) -> Row:
    return Row(HERE, columns)


@pytest.mark.parametrize(
    ("columns", "rename", "expected"),
    [
        ({"messages": []}, {}, "messages"),
        ({"prompt": "", "completion": ""}, {}, "promptCompletion"),
        ({"text": ""}, {}, "text"),
        ({"text": "", "prompt": "", "completion": "", "messages": []}, {}, "messages"),
        ({"question": "", "answer": ""}, {"prompt": "question", "completion": "answer"}, "promptCompletion"),
        ({"question": "", "completion": ""}, {"prompt": "question"}, "promptCompletion"),
    ],
)
def test_the_columns_tell_the_format(columns: dict[str, object], rename: dict[str, str], expected: Format) -> None:
    assert detect_format(row(**columns), rename) == expected


def test_columns_of_no_format() -> None:
    fault = detect_format(row(question="", answer=""), {"text": "body"})
    assert str(fault) == (
        "train.jsonl, line 7: the columns are question, answer, not messages or prompt+completion or body; data.columns can rename them"
    )


def test_examples() -> None:
    assert example_from(row(prompt="a", completion="b"), "promptCompletion", {}) == PromptCompletion(HERE, "a", "b")
    assert example_from(row(prompt="", completion="b"), "promptCompletion", {}) == PromptCompletion(HERE, "", "b")
    assert example_from(row(q="a", completion="b"), "promptCompletion", {"prompt": "q"}) == PromptCompletion(HERE, "a", "b")
    assert example_from(row(text="a", other=1), "text", {}) == Text(HERE, "a")
    assert example_from(row(messages=[USER, ASSISTANT]), "messages", {}) == Conversation(HERE, (USER, ASSISTANT))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT],
        [{"role": "developer", "content": "s"}, USER, ASSISTANT],
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, {"role": "tool", "content": "42"}, ASSISTANT],
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}],
        [USER, {"role": "assistant", "content": [{"type": "text", "text": ""}], "tool_calls": [{"id": 1}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ASSISTANT],
        [{"role": "user", "content": ""}, ASSISTANT],
    ],
)
def test_conversations_that_are_taken(messages: list[object]) -> None:
    assert isinstance(example_from(row(messages=messages), "messages", {}), Conversation)


def test_keys_that_a_columnar_file_left_null_are_dropped() -> None:
    taken = example_from(row(messages=[USER | {"tool_calls": None}, ASSISTANT], tools=None), "messages", {})
    assert taken == Conversation(HERE, (USER, ASSISTANT))


@pytest.mark.parametrize(
    ("format_", "columns", "problem"),
    [
        ("messages", {"text": "a"}, "the column messages is missing; the row has text"),
        ("messages", {"messages": "a"}, "messages must be an array, not a string"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": ["a", ASSISTANT]}, "messages[0] must be an object, not a string"),
        ("messages", {"messages": [USER, {"content": "a"}]}, "messages[1].role is missing"),
        ("messages", {"messages": [USER, {"role": 1, "content": "a"}]}, "messages[1].role must be a string, not a number"),
        (
            "messages",
            {"messages": [USER, {"role": "bot", "content": "a"}]},
            "messages[1].role is 'bot', not one of system, developer, user, assistant, tool",
        ),
        ("messages", {"messages": [{"role": "user"}, ASSISTANT]}, "messages[0].content is missing"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": {}}]}, "messages[1].content must be a string, not an object"),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "messages[1].content is empty, so there is nothing to learn from",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": " "}, {"type": "text", "text": ""}]}]},
            "messages[1].content is empty, so there is nothing to learn from",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image"}], "tool_calls": [{"id": 1}]}]},
            "messages[1].content may hold parts of type text only",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]},
            "messages[0].content may hold parts of type text only",
        ),
        ("messages", {"messages": [USER]}, "messages has no assistant turn to learn from"),
        ("messages", {"messages": [USER, ASSISTANT], "tools": "a"}, "tools must be an array of objects"),
        ("promptCompletion", {"prompt": "a"}, "the column completion is missing; the row has prompt"),
        ("text", {"x" * 90: "a"}, f"the column text is missing; the row has {'x' * 59}…"),
        (
            "text",
            {f"c{place}": "a" for place in range(30)},
            f"the column text is missing; the row has {', '.join(f'c{place}' for place in range(20))}",
        ),
        ("promptCompletion", {"prompt": 1, "completion": "a"}, "prompt must be a string, not a number"),
        ("promptCompletion", {"prompt": "a", "completion": None}, "completion must be a string, not null"),
        ("promptCompletion", {"prompt": "a", "completion": "\n"}, "completion is empty"),
        ("text", {}, "the column text is missing; the row has none"),
        ("text", {"text": ["a"]}, "text must be a string, not an array"),
        ("text", {"text": ""}, "text is empty"),
    ],
)
def test_rows_that_are_not_taken(format_: Format, columns: dict[str, object], problem: str) -> None:
    fault = example_from(row(**columns), format_, {})
    assert isinstance(fault, Fault)
    assert str(fault) == f"train.jsonl, line 7: {problem}"


def test_a_renamed_column_is_named_as_the_data_has_it() -> None:
    fault = example_from(row(q="a", completion="b"), "promptCompletion", {"prompt": "question"})
    assert str(fault).endswith("the column question is missing; the row has q, completion")
