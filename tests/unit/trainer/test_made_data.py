"""Examples that are made of documents: what is asked, what is kept of the answers, and what a killed process has paid for."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from made_site import ASKED, HANDBOOK, OUTPUTS, SAYS, Author, Site

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.data.formats import Conversation, PromptCompletion
from finetune_trainer.data.inputs import check_unchanged
from finetune_trainer.data.reading import examples_of
from finetune_trainer.data.rows import Fault, Row
from finetune_trainer.errors import JobError
from finetune_trainer.made_data import writer
from finetune_trainer.storage import Storage


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def refusal(site: Site, job: FineTuneJob, author: Author) -> JobError:
    with pytest.raises(JobError) as caught:
        site.rows(job, author)
    return caught.value


def test_points_that_a_passage_supports_become_the_prompt_of_a_golden_output(site: Site) -> None:
    author = Author(SAYS)
    rows = site.rows(site.job(), author)
    assert [row.columns for row in rows if isinstance(row, Row)] == [
        {
            "prompt": "Write a text that makes these points:\n- A tool may be kept for 14 days\n- Extend the loan once by 7 days",
            "completion": OUTPUTS[0],
        },
        {
            "prompt": "Write a text that makes these points:\n- The south depot lends trailers\n- It is open on Fridays",
            "completion": OUTPUTS[1],
        },
    ]
    assert [str(row.place).rpartition("/")[2] for row in rows] == ["golden.jsonl, line 1", "golden.jsonl, line 2"]
    assert "[1] Loans\nA tool may be kept for 14 days." in author.told[0]
    assert f"Text:\n{OUTPUTS[0]}\n" in author.told[0]
    assert site.said == [
        "data.preparation.contentPoints.knowledgeBase: 3 passages of 1 document",
        "data.preparation.contentPoints: 2 examples of 2 golden outputs; of 7 points written, passages support 4",
    ]
    assert (author.opened, author.closed) == (1, 1)


def test_templates_are_the_users_and_braces_of_texts_are_left_alone(site: Site) -> None:
    site.golden({"ask": "When {points}?", "out": "Trailers are {passages} on Fridays, says the south depot.", "text": 3})
    author = Author(SAYS)
    job = site.job(
        goldenOutputs={"column": "out", "promptColumn": "ask"},
        retriever={"passages": 1},
        instruction="From {passages} list {output} and {else}",
        prompt="{prompt} Use: {points}",
    )
    rows = site.rows(job, author)
    depots = HANDBOOK.rpartition("# Depots\n")[2].strip()
    assert author.told == [f"From [1] Depots\n{depots} list Trailers are {{passages}} on Fridays, says the south depot. and {{else}}"]
    assert [row.columns["prompt"] for row in rows if isinstance(row, Row)] == [
        "When {points}? Use: - The south depot lends trailers\n- It is open on Fridays"
    ]


@pytest.mark.parametrize(
    ("data", "is_chat", "kind"),
    [
        ({}, False, PromptCompletion),
        ({}, True, Conversation),
        ({"format": "messages", "columns": {"messages": "turns"}}, False, Conversation),
        ({"format": "promptCompletion", "columns": {"prompt": "question", "completion": "text"}}, True, PromptCompletion),
    ],
)
def test_the_rows_are_such_as_the_job_reads(site: Site, data: dict[str, Any], is_chat: bool, kind: type) -> None:
    job = site.job(data)
    examples = list(examples_of(site.rows(job, Author(SAYS), is_chat=is_chat), job))
    assert [type(example) for example in examples] == [kind, kind]
    last = examples[1]
    assert (last.completion if isinstance(last, PromptCompletion) else last.messages[-1]["content"]) == OUTPUTS[1]  # type: ignore[union-attr]


def test_rows_keep_the_group_that_they_belong_to(site: Site) -> None:
    rows = site.rows(site.job({"groupBy": "id"}), Author(SAYS))
    assert [row.columns["id"] for row in rows if isinstance(row, Row)] == ["0", "1"]


def test_outputs_that_cannot_be_used_are_told_of_in_their_place(site: Site) -> None:
    site.golden({"text": OUTPUTS[0]}, {"body": "x"}, {"text": 4}, {"text": " "}, {"text": OUTPUTS[1]})
    rows = site.rows(site.job(), Author(SAYS))
    assert [str(row).rpartition("/")[2] if isinstance(row, Fault) else row.columns["completion"] for row in rows] == [
        OUTPUTS[0],
        "golden.jsonl, line 2: the column text (data.preparation.contentPoints.goldenOutputs.column) is missing; the row has body",
        "golden.jsonl, line 3: text must be a string, not a number",
        "golden.jsonl, line 4: text is empty",
        OUTPUTS[1],
    ]


def test_outputs_without_a_passage_are_not_asked_for_and_those_without_a_point_left_out(site: Site) -> None:
    site.golden({"text": "Xylophones!"}, {"text": OUTPUTS[0]}, {"text": OUTPUTS[1]})
    author = Author({"Your drill": "- Bring cake", "Trailers are": SAYS["Trailers are"]})
    assert [row.place.number for row in site.rows(site.job(), author) if isinstance(row, Row)] == [3]
    assert len(author.told) == 2
    assert site.said[-1] == (
        "data.preparation.contentPoints: 1 examples of 3 golden outputs; of 3 points written, passages support 2; "
        "golden outputs that share no word with any passage: 1; golden outputs without a supported point: 1"
    )


def test_an_output_of_which_nothing_is_made_is_told_of_by_file_line_and_reason(site: Site) -> None:
    outputs = ("Xylophones!", OUTPUTS[0], "The fees are 2 euros.", "Depots.", OUTPUTS[1])
    site.golden(*({"text": output} for output in outputs))
    long = {"": "", "Your drill": "- Bring cake\n- Sing", "The fees": "12.", "Trailers are": SAYS["Trailers are"]}
    author = Author({key: long[key] for key in ("Your drill", "The fees", "Trailers are", "")})
    rows = site.rows(site.job(), author)
    told = next(text for text in author.told if "Depots." in text)
    faults = [row for row in rows if isinstance(row, Fault)]
    assert [(fault.place.file.rpartition("/")[2], fault.place.number, fault.counts) for fault in faults] == [
        ("golden.jsonl", line, False) for line in (1, 2, 3, 4)
    ]
    passages, length = told.count("\n[") + told.startswith("["), len(told)
    assert [fault.problem for fault in faults] == [
        "no passage of the knowledge base has a word in common with the output",
        "no passage supports any of the 2 points that the generator wrote",
        "the generator listed no points, one a line",
        f"the generator wrote nothing: what it was told has {length:,} characters, with {passages} passages, which may leave no room "
        "for an answer",
    ]
    assert [row.columns["completion"] for row in rows if isinstance(row, Row)] == [OUTPUTS[1]]


def test_where_nothing_is_supported_the_job_fails_and_says_what_to_do(site: Site) -> None:
    error = refusal(site, site.job(), Author({"": "- Bring cake"}))
    assert error.reason is Reason.DATASET_INVALID
    assert error.message == (
        "data.preparation.contentPoints: 0 examples of 2 golden outputs; of 2 points written, passages support 0; "
        "golden outputs without a supported point: 2: "
        "check that the knowledge base holds what the outputs say, or lower minSupport"
    )
    assert len(site.rows(site.job(minSupport=0), Author({"": "- Bring cake"}))) == 2


def test_an_empty_knowledge_base_is_refused_before_anything_is_asked(site: Site) -> None:
    (site.folder / "kb" / "handbook.md").write_text("\n")
    author = Author(SAYS)
    error = refusal(site, site.job(), author)
    assert error.reason is Reason.KNOWLEDGE_BASE_INVALID
    assert "data.preparation.contentPoints.knowledgeBase: " in error.message
    assert "holds no text" in error.message
    assert author.opened == 0


def test_what_was_written_is_not_asked_for_again(site: Site) -> None:
    many = [f"Your drill number {number} is due after 14 days." for number in range(7)]
    site.golden(*({"text": text} for text in many))
    author = Author(SAYS, stops_after=5)
    assert refusal(site, site.job(), author).message == "killed on the way"
    assert author.closed == 1
    again = Author(SAYS)
    rows = site.rows(site.job(), again)
    assert len(rows) == 7
    assert len(again.told) == 2
    third = Author(SAYS)
    assert site.rows(site.job(prompt="Also: {points}", minSupport=0.4), third)
    assert third.opened == 0
    assert len(site.rows(site.job(maxNewTokens=8), third)) == 7
    assert len(third.told) == 7
    assert len(site.rows(site.job(), third, name="another")) == 7
    assert len(third.told) == 14


def test_texts_are_saved_while_the_generator_writes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SAVE_SECONDS", -1.0)
    written = Storage.write_json
    saved: list[int] = []

    def write(self: Storage, name: str, value: Any) -> None:
        saved.append(len(value) if "cache/made" in self.uri else 0)
        written(self, name, value)

    monkeypatch.setattr(Storage, "write_json", write)
    assert len(site.rows(site.job(), Author(SAYS))) == 2
    assert [number for number in saved if number] == [1, 1]
    told = [line.partition(" after ")[0] for line in site.said if "written" in line]
    assert told[:2] == [f"data.preparation.contentPoints.generator: {words} written" for words in ("1 text is", "2 texts are")]


def test_empty_texts_are_asked_for_again_and_half_characters_are_no_obstacle(site: Site) -> None:
    author = Author({"Your drill": "", "Trailers are": "- The south depot lends trailers \ud83d"})
    rows = site.rows(site.job(), author)
    assert [row.columns["prompt"].rpartition("- ")[2] for row in rows if isinstance(row, Row)] == ["The south depot lends trailers ?"]
    again = Author(SAYS)
    assert len(site.rows(site.job(), again)) == 2
    assert len(again.told) == 1


def test_damaged_texts_are_written_again(site: Site) -> None:
    site.rows(site.job(), Author(SAYS))
    for path in (site.folder / "out" / ".finetune" / "cache" / "made").glob("*/*.json"):
        path.write_bytes(b'{"half')
    again = Author(SAYS)
    assert len(site.rows(site.job(), again)) == 2
    assert len(again.told) == 2


def test_a_generator_that_keeps_its_answers_is_asked_each_time(site: Site) -> None:
    for _ in range(2):
        author = Author(SAYS)
        site.rows(site.job(), author, keeps=True)
        assert len(author.told) == 2
    assert not (site.folder / "out" / ".finetune" / "cache" / "made").exists()


def test_a_generator_that_writes_too_little_is_told_of(site: Site) -> None:
    error = refusal(site, site.job(), Author(SAYS, shortfall=1))
    assert error.reason is Reason.GENERATOR_UNAVAILABLE
    assert error.message == "data.preparation.contentPoints.generator: the generator has written 1 texts for 2 prompts"


def test_the_identity_follows_content_settings_and_generator(site: Site) -> None:
    one = site.made(site.job(), Author(SAYS)).identity()
    assert one == site.made(site.job(), Author({})).identity()
    assert one != site.made(site.job(minSupport=0.6), Author(SAYS)).identity()
    assert one != site.made(site.job(), Author(SAYS), name="another").identity()
    assert one != site.made(site.job(), Author(SAYS), is_chat=True).identity()
    before = site.made(site.job(), Author(SAYS)).state()
    (site.folder / "kb" / "more.md").write_text("More.")
    made = site.made(site.job(), Author(SAYS))
    assert one != made.identity()
    with pytest.raises(JobError, match=r"data\.preparation: the data has changed"):
        check_unchanged(before, made.state(), "data.preparation")
    more = made.identity()
    site.golden({"text": "Another."})
    assert more != made.identity()


def test_questions_are_kept_if_their_passage_supports_the_answer_and_once(site: Site) -> None:
    rows = site.rows(site.job(questions={}), Author(ASKED))
    made = {row.columns["prompt"]: row.columns["completion"] for row in rows if isinstance(row, Row)}
    kept = {name.casefold().rstrip("?"): answer for name, answer in made.items()}
    assert kept.pop("how long may a tool be kept") in ("For 14 days.", "Until the south depot is open.\nAnd so on.")
    assert kept == {"what do late tools cost": "Late tools cost\n2 euros a day.", "who cannot borrow": "A member with fees above 20 euros"}
    assert all(str(row.place).endswith(("handbook.md, question 1", "handbook.md, question 2")) for row in rows)
    assert site.said[-1] == "data.preparation.questions: 3 examples of 3 passages; of 5 answers written, passages support 4"


def test_questions_are_asked_as_often_as_the_limit_needs(site: Site) -> None:
    author = Author(ASKED)
    assert len(site.rows(site.job(questions={"limit": 1, "perPassage": 1}), author)) == 1
    assert len(author.told) == 1
    assert "Write 1 questions that the passage below answers" in author.told[0]
    assert author.told[0].endswith(tuple(f"{line}\n" for line in HANDBOOK.splitlines()))
    more = Author({"Loans": "no pair", "Fees": "none", "Depots": "Q: Where are trailers lent?\nA: At the south depot."})
    assert len(site.rows(site.job(questions={"limit": 1, "perPassage": 1}), more, name="another")) == 1


def test_more_passages_are_asked_about_by_what_came_of_the_first(site: Site) -> None:
    """100 passages, half of which give a question: of 10 come 5, so 10 more are asked for the other 5, but 16 are the least."""
    rows = [{"text": f"Item {number} costs {number} euros and stands on the long shelf.", "title": f"{number}"} for number in range(100)]
    (site.folder / "kb" / "handbook.md").unlink()
    (site.folder / "kb" / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes: list[int] = []

    class Shop(Author):
        def generate(self, prompts: Sequence[Any], max_new_tokens: int) -> Iterator[str]:
            sizes.append(len(prompts))
            for place, messages in enumerate(prompts):
                number = re.search(r"Item (\d+)", messages[0]["content"])[1]  # type: ignore[index]
                yield f"Q: What costs item {number}?\nA: {number if place % 2 else 7777} euros" if len(sizes) < 3 else ""

    assert len(site.rows(site.job(questions={"limit": 10, "perPassage": 1}), Shop({}))) == 10
    assert sizes == [10, 16]


def test_short_passages_are_not_asked_about_and_nothing_made_is_told(site: Site) -> None:
    (site.folder / "kb" / "handbook.md").write_text("# A\nToo short.\n# B\nThis one has more than eight words in all of it.\n")
    author = Author({"": "I cannot do that."})
    error = refusal(site, site.job(questions={}), author)
    assert len(author.told) == 1
    assert error.reason is Reason.DATASET_INVALID
    assert error.message == (
        "data.preparation.questions: 0 examples of 1 passages; of 0 answers written, passages support 0; "
        "passages without a supported answer: 1: take a larger generator, or lower minSupport"
    )


def test_both_come_one_after_the_other_and_nothing_is_made_for_other_jobs(site: Site) -> None:
    job = site.job(questions={"limit": 2}, prompt="{points}")
    rows = site.rows(job, Author(SAYS | ASKED))
    assert [row.columns["completion"] for row in rows[:2] if isinstance(row, Row)] == OUTPUTS
    assert len(rows) == 4
    spec = {
        "model": {"source": "hf://owner/name"},
        "data": {"train": {"source": "pvc://data/train.jsonl"}},
        "method": {"lora": {}},
        "output": {"storage": "pvc://data/out"},
    }
    plain = parse_job({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bot"}, "spec": spec})
    assert site.made(plain, Author(SAYS)) is None
