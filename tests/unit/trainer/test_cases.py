from pathlib import Path

import fsspec
import numpy as np
import pytest

from finetune_api.reasons import Reason
from finetune_trainer.data import cases as cases_module
from finetune_trainer.data.cases import Case, CaseWriter, case_of, cases_file, divide_cases, read, read_cases, some_to_show, written
from finetune_trainer.data.formats import Conversation, Preference, PromptCompletion, Text
from finetune_trainer.data.rows import Place
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location

PLACE = Place("f.jsonl", 3)


def turn(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


ASKED, ANSWERED = turn("user", "a?"), turn("assistant", "A.")
AGAIN, LAST = turn("user", "b?"), turn("assistant", [{"type": "text", "text": "B"}, {"type": "text", "text": "."}])
TOOL = {"type": "function", "function": {"name": "now"}}
CALL = [{"function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize(
    ("example", "case"),
    [
        (PromptCompletion(PLACE, "q", "a"), Case("7", "a", "q", place="f.jsonl, line 3")),
        (Text(PLACE, "all of it"), Case("7", "", "all of it", place="f.jsonl, line 3")),
        (
            Conversation(PLACE, (ASKED, ANSWERED, AGAIN, LAST), (TOOL,)),
            Case("7", "B.", None, (ASKED, ANSWERED, AGAIN), (TOOL,), "f.jsonl, line 3"),
        ),
        (Conversation(PLACE, (ASKED, ANSWERED, AGAIN)), Case("7", "A.", None, (ASKED,), place="f.jsonl, line 3")),
        (Conversation(PLACE, (ANSWERED,)), Case("7", "A.", "", place="f.jsonl, line 3")),
        (
            Conversation(PLACE, (ASKED, turn("assistant", None, tool_calls=CALL))),
            Case(
                "7",
                '[{"function": {"name": "now", "arguments": {}}}]',
                None,
                (ASKED,),
                place="f.jsonl, line 3",
                turn=turn("assistant", None, tool_calls=CALL),
            ),
        ),
        (
            Preference(PLACE, Conversation(PLACE, (ASKED, ANSWERED), (), 1), Conversation(PLACE, (ASKED, LAST), (), 1)),
            Case("7", "A.", None, (ASKED,), place="f.jsonl, line 3"),
        ),
        (
            Preference(PLACE, PromptCompletion(PLACE, "q", "good"), PromptCompletion(PLACE, "q", "bad")),
            Case("7", "good", "q", place="f.jsonl, line 3"),
        ),
    ],
    ids=["prompt", "text", "last turn", "ends with the user", "no question", "tool calls", "preferred turns", "preferred text"],
)
def test_how_an_example_is_asked(example: object, case: Case) -> None:
    assert case_of(example, "7") == case
    assert list(read(written([case]), Case)) == [case]


def test_a_case_is_one_line_for_every_reader() -> None:
    """Some take these characters for the end of a line."""
    case = Case("0", "a\x85b\u2028c\u2029d\ne\r\x0bf é", "")
    (line,) = written([case])
    assert len(line.splitlines()) == 1
    assert "é" in line
    assert list(read([line], Case)) == [case]


def write(folder: Path, split: str, *answers: str) -> None:
    with CaseWriter(folder, split, wanted=True) as writer:
        for answer in answers:
            writer.add(Case("", answer, "q"))


def answers(folder: Path, split: str) -> list[tuple[str, str]]:
    found = read_cases(Location(fsspec.filesystem("file"), str(folder), f"file://{folder}"), split)
    return [(case.id, case.reference) for case in found]


def test_what_is_divided_is_numbered_anew(tmp_path: Path) -> None:
    write(tmp_path, "all", *"abcdef")
    divide_cases(tmp_path, "all", np.array([1, 0, -1, 1, 2, 1], np.int8), {1: "validation", 2: "test"})
    assert answers(tmp_path, "validation") == [("000000", "a"), ("000001", "d"), ("000002", "f")]
    assert answers(tmp_path, "test") == [("000000", "e")]
    assert {path.name for path in tmp_path.iterdir()} == {cases_file("validation"), cases_file("test")}


def test_what_is_not_wanted_is_not_written(tmp_path: Path) -> None:
    with CaseWriter(tmp_path, "test", wanted=False) as writer:
        writer.add(Case("", "a"))
    assert list(tmp_path.iterdir()) == []
    assert answers(tmp_path, "test") == []


def test_some_of_the_training_data_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases_module, "TRAIN_CASES", 5)
    sides = np.array([0, 1] * 10, np.int8)
    one, again, other = (some_to_show(sides, 0, seed) for seed in (1, 1, 2))
    assert one.sum() == 5
    assert not one[1::2].any()
    assert one.tolist() == again.tolist() != other.tolist()
    assert some_to_show(sides[:6], 0, 1).tolist() == [True, False, True, False, True, False]


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / cases_file("test")).write_text('{"id": "0"\n')
    with pytest.raises(JobError, match=r"test-cases\.jsonl is not as it was written") as caught:
        answers(tmp_path, "test")
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE
