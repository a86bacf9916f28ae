"""Preference data: what a row may hold, what it is read as, and what of it is learnt."""

from pathlib import Path

import pytest
from test_encoding import MARKED, REWRITING, UNMARKED
from tests.prepared_data import prepare_data
from tiny_models import CHATML, byte_tokenizer, job_manifest, write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import parse_job
from finetune_trainer.data.encoding import Encoded, Encoder
from finetune_trainer.data.examples import Examples, Prepared
from finetune_trainer.data.formats import Conversation, Fault, Preference, PromptCompletion, detect_format, example_from
from finetune_trainer.data.rows import Place, Row
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Mounts

HERE = Place("train.jsonl", 7)
USER = {"role": "user", "content": "Hi"}
GOOD, BAD = {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "Go away"}
LONG = [USER, GOOD, USER]


def row(**columns: object) -> Row:
    return Row(HERE, columns)


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(HERE, PromptCompletion(HERE, prompt, chosen), PromptCompletion(HERE, prompt, rejected))


def turns(given: list[dict[str, str]], *answers: list[dict[str, str]]) -> Preference:
    return Preference(HERE, *(Conversation(HERE, (*given, *answer), (), len(given)) for answer in answers))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, pair("2+2=", "4", "5")),
        ({"prompt": "", "chosen": "4", "rejected": "5"}, pair("", "4", "5")),
        ({"chosen": "Q: 2+2? A: 4", "rejected": "Q: 2+2? A: 5, or 6"}, pair("Q: 2+2? A: ", "4", "5, or 6")),
        ({"chosen": "stop", "rejected": "stop it"}, pair("stop", "", " it")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, turns([USER], [GOOD], [BAD])),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, turns([USER], [GOOD], [BAD])),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 1}, turns([USER], [GOOD], [BAD])),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, turns([USER], [GOOD], [BAD])),
        ({"prompt": None, "chosen": [*LONG, GOOD], "rejected": [*LONG, BAD]}, turns(LONG, [GOOD], [BAD])),
        ({"prompt": [GOOD], "chosen": [*LONG, GOOD], "rejected": [*LONG, BAD]}, turns([GOOD], [*LONG, GOOD], [*LONG, BAD])),
    ],
    ids=["texts", "no prompt", "a prompt in the texts", "one text begins the other", "messages", "a prompt in the messages",
         "a prompt in both, as text", "a prompt in both", "several turns in common", "several turns of an answer"],
)  # fmt: skip
def test_preferences(columns: dict[str, object], expected: Preference) -> None:
    assert example_from(row(**columns), "preference", {}) == expected


def test_renamed_columns() -> None:
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert example_from(row(question="a", good="b", bad="c"), "preference", columns) == pair("a", "b", "c")
    fault = example_from(row(prompt="a", good="b", bad="c"), "preference", columns)
    assert str(fault) == "train.jsonl, line 7: the column question is missing; the row has prompt, good, bad"


def test_keys_that_a_columnar_file_left_null_make_no_difference() -> None:
    columns = {"chosen": [USER | {"name": None}, GOOD], "rejected": [USER, BAD]}
    assert example_from(row(**columns), "preference", {}) == turns([USER], [GOOD], [BAD])


SAME = "chosen and rejected are the same, so neither is better"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, "the column rejected is missing; the row has prompt, chosen"),
        ({"prompt": "a", "rejected": "b"}, "the column chosen is missing; the row has prompt, rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected must be a string or an array of messages, not null"),
        ({"prompt": "a", "chosen": {"role": "user"}, "rejected": "b"}, "chosen must be a string or an array of messages, not an object"),
        ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "rejected is empty"),
        ({"prompt": "a", "chosen": [], "rejected": [BAD]}, "chosen is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, SAME),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, SAME),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD | {"name": None}]}, SAME),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "chosen is a string, rejected an array; both must be of one kind"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "prompt must be a string like chosen, not a number"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "prompt must be a string like chosen, not an array"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant"}]}, "rejected[0].content is missing"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD | {"content": ""}]},
         "rejected[0].content is empty, so there is nothing to learn from"),
        ({"prompt": ["Hi"], "chosen": [GOOD], "rejected": [BAD]}, "prompt[0] must be an object, not a string"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "rejected has no assistant turn of its own to learn from"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "rejected has no assistant turn of its own to learn from"),
        ({"chosen": [USER, GOOD], "rejected": [USER], "tools": "a"}, "tools must be an array of objects"),
        ({"chosen": [GOOD], "rejected": [BAD]},
         "prompt is missing, and chosen and rejected begin with no turn in common that could stand for it"),
        ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
         "prompt holds no messages, and chosen and rejected begin with no turn in common that could stand for it"),
    ],
)  # fmt: skip
def test_rows_that_are_not_taken(columns: dict[str, object], problem: str) -> None:
    assert str(example_from(row(**columns), "preference", {})) == f"train.jsonl, line 7: {problem}"


def test_preferences_are_seen_by_their_columns_where_the_objective_learns_from_them() -> None:
    both = row(messages=[USER, GOOD], prompt="a", chosen=[USER, GOOD], rejected=[USER, BAD])
    assert detect_format(both, {}, preferences=True) == "preference"
    assert detect_format(both, {}) == "messages"
    assert detect_format(row(good="a", bad="b"), {"chosen": "good", "rejected": "bad"}, preferences=True) == "preference"


def encode(example: Preference, template: str | None = CHATML, length: int = 1000) -> list[Encoded | Fault]:
    return list(Encoder(byte_tokenizer(template), "completion", length).encode([example]))


def learnt(encoded: list[Encoded | Fault]) -> list[tuple[str, str]]:
    """Each document as text, and the part of it that is learnt."""
    tokenizer = byte_tokenizer()
    assert all(isinstance(item, Encoded) for item in encoded), encoded
    return [(tokenizer.decode(item.tokens.tolist()), tokenizer.decode(item.tokens[item.labelled].tolist())) for item in encoded]


def test_both_answers_are_learnt_the_chosen_one_first() -> None:
    assert learnt(encode(pair("2+2=", "4", "five"))) == [("2+2=4<eos>", "4<eos>"), ("2+2=five<eos>", "five<eos>")]


def test_where_one_answer_begins_the_other_its_end_is_learnt() -> None:
    assert learnt(encode(pair("stop", "", " it"))) == [("stop<eos>", "<eos>"), ("stop it<eos>", " it<eos>")]


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>\n"), (MARKED, "<eos>"), (UNMARKED, "<eos>"), (REWRITING, "")])
def test_of_messages_the_last_turn_is_learnt_and_no_earlier_one(template: str, end: str) -> None:
    example = turns([USER, GOOD, USER], [GOOD], [BAD])
    thought = "<think></think>" if template == REWRITING else ""
    assert [part for _, part in learnt(encode(example, template))] == [f"{thought}Hello{end}", f"{thought}Go away{end}"]


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>\n"), (MARKED, "<eos>")])
def test_of_an_answer_of_several_turns_the_models_are_learnt(template: str, end: str) -> None:
    example = turns([USER, GOOD, USER], [GOOD, USER, BAD], [BAD])
    assert [part for _, part in learnt(encode(example, template))] == [f"Hello{end}Go away{end}", f"Go away{end}"]


def test_a_template_that_rewrites_an_answers_turns_is_told() -> None:
    (fault,) = encode(turns([USER], [GOOD, USER, BAD], [BAD]), REWRITING)
    assert isinstance(fault, Fault)
    assert "writes messages[1] differently when others follow" in fault.problem
    assert fault.problem.endswith("let each answer be one turn")


@pytest.mark.parametrize("bad_one", ["chosen", "rejected"])
def test_one_fault_stands_for_both_answers(bad_one: str) -> None:
    refusing = "{% if messages[-1].content == 'Go away' %}{{ raise_exception('be polite') }}{% endif %}" + CHATML
    answers = [[BAD], [GOOD]] if bad_one == "chosen" else [[GOOD], [BAD]]
    assert [str(item) for item in encode(turns([USER], *answers), refusing)] == [
        "train.jsonl, line 7: the chat template refuses the messages: be polite"
    ]


def test_answers_that_are_the_same_once_they_are_cut_have_nothing_to_learn() -> None:
    whole, cut = encode(pair("a", "1234", "1235"), length=5), encode(pair("a", "1234", "1235"), length=4)
    assert [item.has_labels() for item in whole] == [True, True]
    assert [item.has_labels() for item in cut] == [False, False]


def prepared(folder: Path, tokenizer: PreTrainedTokenizerFast, *rows: object, **spec: object) -> Prepared:
    write_jsonl(folder / "train.jsonl", *rows)
    data = {"train": {"source": f"file://{folder}/train.jsonl"}, **spec.pop("data", {})}
    job = parse_job(job_manifest(data=data, **({"objective": {"dpo": {}}} | spec)), local=True)
    return prepare_data(job, tokenizer, Mounts(folder, local=True))


def texts(examples: Examples, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(examples.example(index)[0].tolist()) for index in range(len(examples))]


def test_pairs_stay_together_when_some_are_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"{number}: ", "chosen": "yes", "rejected": "no"} for number in range(20)]
    data = prepared(tmp_path, tokenizer, *rows)
    assert (data.train.group, data.train.groups, data.validation.groups) == (2, 18, 2)
    for split in (data.train, data.validation):
        documents = texts(split, tokenizer)
        assert [text.replace("yes", "no") for text in documents[::2]] == documents[1::2]
        assert all("yes" in text for text in documents[::2])


def test_a_pair_is_left_out_whole_where_one_answer_has_no_label_left(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    long = {
        "prompt": None,
        "chosen": [{"role": "user", "content": "a" * 30}, GOOD],
        "rejected": [{"role": "user", "content": "a" * 30}, BAD],
    }
    short = {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    data = prepared(tmp_path, tokenizer, short, long, short, training={"maxSequenceLength": 40})
    assert (data.train.groups, data.validation.groups, data.rejected) == (1, 1, 1)


@pytest.mark.parametrize(
    ("line", "spec", "problem"),
    [
        (
            {"prompt": "a", "completion": "b"},
            {},
            "the columns are prompt, completion, not chosen+rejected, which objective.dpo learns from: these are examples for",
        ),
        ({"prompt": "a", "chosen": "b"}, {"data": {"format": "preference"}}, "the column rejected is missing; the row has prompt, chosen"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"objective": {"sft": {}}},
            "these are preferences, which only objective.dpo learns from",
        ),
    ],
    ids=["no preferences", "no rejected answer", "preferences for another objective"],
)
def test_data_and_objective_must_go_together(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: object, spec: dict[str, object], problem: str
) -> None:
    with pytest.raises(JobError) as caught:
        prepared(tmp_path, tokenizer, line, line, **spec)
    assert caught.value.reason == Reason.DATASET_INVALID
    assert caught.value.message.startswith("data.train: 2 rows cannot be used. ")
    assert f"file://{tmp_path}/train.jsonl, lines 1, 2: " in caught.value.message
    assert problem in caught.value.message


def test_a_bad_pair_among_good_ones_is_told_by_its_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(JobError, match=r"1 row cannot be used.*line 2: chosen and rejected are the same"):
        prepared(tmp_path, tokenizer, good, good | {"rejected": "b"}, good)
