"""What of the data is left out, what is held out, and what is measured, as a job asks for it."""

import json
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from test_prepare import Counted
from tiny_models import job_manifest, write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.data import encoding
from finetune_trainer.data.cases import Case, read_cases
from finetune_trainer.data.examples import Examples, Prepared, open_prepared
from finetune_trainer.data.inputs import Input
from finetune_trainer.data.prepare import MADE, inputs_of, write_data
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location, Mounts

Rows = list[dict[str, Any]]
VALIDATION = {"source": "file://{folder}/validation.jsonl"}


def words(number: int) -> str:
    """A text of 24 letters like no other, so that nothing leaks."""
    return "".join(chr(ord("a") + int(place)) for place in np.random.default_rng(number).integers(0, 26, 24))


def rows(*numbers: int, **columns: object) -> Rows:
    return [{"prompt": f"{words(number)}? ", "completion": f"{number:02}", **columns} for number in numbers]


class Prepare:
    """A job's data in a folder of its own."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.out, self.tokenizer = folder, folder / "prepared", tokenizer
        self.manifest: dict[str, Any] = {}

    def job(self, spec: dict[str, Any], data: dict[str, Any]) -> FineTuneJob:
        whole = json.dumps({"data": {"train": {"source": "file://{folder}/train.jsonl"}, **data}, **spec})
        return parse_job(job_manifest(**json.loads(whole.replace("{folder}", str(self.folder)))), local=True)

    def __call__(self, train: Rows | None, spec: dict[str, Any] | None = None, made: Input | None = None, **data: Any) -> Prepared:
        if train is not None:
            write_jsonl(self.folder / "train.jsonl", *train)
        job = self.job(spec or {}, data if train is not None else data | {"train": None})
        self.out.mkdir()
        self.manifest = write_data(self.out, job, inputs_of(job, Mounts(self.folder, local=True), made), self.tokenizer)
        return open_prepared(self.location, self.folder)

    @property
    def location(self) -> Location:
        return Location(fsspec.filesystem("file"), str(self.out), f"file://{self.out}")

    def summary(self, *names: str) -> tuple[Any, ...]:
        return tuple(self.manifest["summary"][name] for name in names)

    def rejects(self) -> Rows:
        path = self.out / "rejects.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def answers(self, examples: Examples) -> list[str]:
        """What is learnt of each example, without the end."""
        learnt = (tokens[labelled] for tokens, labelled in map(examples.example, range(len(examples))))
        return [self.tokenizer.decode(tokens.tolist()).removesuffix("<eos>") for tokens in learnt]

    def cases(self, split: str) -> list[Case]:
        return read_cases(self.location, split)


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Prepare:
    return Prepare(tmp_path, tokenizer)


@pytest.fixture
def validation(tmp_path: Path) -> dict[str, str]:
    write_jsonl(tmp_path / "validation.jsonl", *rows(90, 91))
    return VALIDATION


def faulty(good: int, bad: int) -> Rows:
    return [*rows(*range(good)), *({"prompt": "q"} for _ in range(bad))]


def test_rows_that_cannot_be_used_are_left_out_up_to_a_share(prepare: Prepare, validation: dict[str, str], tmp_path: Path) -> None:
    prepared = prepare(faulty(8, 2), validation=validation, preparation={"maxRejectedFraction": 0.2})
    assert prepare.answers(prepared.train) == [f"{number:02}" for number in range(8)]
    assert prepare.summary("train", "rejected") == (8, 2)
    reason = "the column completion is missing; the row has prompt"
    where = {"data": "data.train", "file": f"file://{tmp_path}/train.jsonl"}
    assert prepare.rejects() == [{**where, "line": line, "reason": reason} for line in (9, 10)]


def test_a_share_is_met_by_as_many(prepare: Prepare, validation: dict[str, str]) -> None:
    """0.29 * 100 is a little less than 29."""
    prepare(faulty(71, 29), validation=validation, preparation={"maxRejectedFraction": 0.29})
    assert prepare.summary("rejected") == (29,)


def test_more_of_them_are_an_error_that_names_the_first(prepare: Prepare, validation: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        prepare(faulty(7, 3), validation=validation, preparation={"maxRejectedFraction": 0.2})
    assert caught.value.reason == Reason.DATASET_INVALID
    assert caught.value.message == (
        f"data.train: 3 of 10 rows (data.preparation.maxRejectedFraction is 0.2) cannot be used. "
        f"file://{tmp_path}/train.jsonl, lines 8, 9, 10: the column completion is missing; the row has prompt"
    )
    assert [row["line"] for row in prepare.rejects()] == [8, 9, 10]


def test_where_none_can_be_used_no_share_is_enough(prepare: Prepare, validation: dict[str, str]) -> None:
    with pytest.raises(JobError, match="2 of 2 rows"):
        prepare(faulty(0, 2), validation=validation, preparation={"maxRejectedFraction": 1.0})


def test_the_share_is_of_each_source(prepare: Prepare, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "validation.jsonl", *faulty(1, 1))
    with pytest.raises(JobError, match=r"data.validation: 1 of 2 rows"):
        prepare(rows(*range(9)), validation=VALIDATION, preparation={"maxRejectedFraction": 0.2})


def test_what_has_nothing_to_learn_is_told_too(prepare: Prepare, validation: dict[str, str]) -> None:
    train = [*rows(0), {"prompt": "0" * 100, "completion": "a"}]
    prepare(train, spec={"training": {"maxSequenceLength": 64}}, validation=validation)
    assert [(row["line"], row["reason"]) for row in prepare.rejects()] == [
        (2, "no label is within maxSequenceLength; the example has 102 tokens")
    ]


@pytest.mark.parametrize(("kind", "kept", "lines"), [("none", "0123012", []), ("exact", "01234", [5, 6]), ("near", "0123", [5, 6, 7])])
def test_duplicates_are_left_out_before_any_are_held_out(
    prepare: Prepare, validation: dict[str, str], kind: str, kept: str, lines: list[int]
) -> None:
    """Six rows, of which two repeat, and one that differs in its last letter of two hundred."""
    long = [{"prompt": "".join(words(number * 10 + part) for part in range(8)), "completion": str(number)} for number in range(4)]
    nearly = {**long[2], "completion": "4"}
    train = [*long, long[0], long[1], nearly]
    prepared = prepare(train, validation=validation, preparation={"deduplicate": kind})
    assert prepare.answers(prepared.train) == (["0", "1", "2", "3", "0", "1", "4"] if kind == "none" else list(kept))
    assert prepare.summary("train", "duplicates", "rejected") == (7 - len(lines), len(lines), 0)
    assert [row["line"] for row in prepare.rejects()] == lines
    if kind == "exact":
        assert re.fullmatch(r"a duplicate of file://\S+/train.jsonl, line 1", prepare.rejects()[0]["reason"])


def leaking(tmp_path: Path) -> Rows:
    """Nine rows to train on, of which two are in the validation data, too."""
    write_jsonl(tmp_path / "validation.jsonl", *rows(3, 90, 5))
    return rows(*range(9))


def test_leakage_is_warned_of(prepare: Prepare, tmp_path: Path) -> None:
    prepared = prepare(leaking(tmp_path), validation=VALIDATION)
    assert (len(prepared.train), *prepare.summary("leaked")) == (9, 2)
    (warning,) = prepare.manifest["warnings"]
    assert warning.startswith("data.train: 2 of 9 training examples hold 70% or more of an example that is measured (data.validation), so ")
    assert len(warning) <= 512
    assert prepare.rejects() == []


def test_the_warning_says_where(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        prepare(leaking(tmp_path), validation=VALIDATION, preparation={"leakage": "fail"})
    assert caught.value.reason == Reason.DATASET_INVALID
    assert caught.value.message.endswith(
        f"The first: file://{tmp_path}/train.jsonl, line 4 holds file://{tmp_path}/validation.jsonl, line 1"
    )


def test_what_leaks_can_be_left_out(prepare: Prepare, tmp_path: Path) -> None:
    prepared = prepare(leaking(tmp_path), validation=VALIDATION, preparation={"leakage": "drop"})
    assert prepare.answers(prepared.train) == ["00", "01", "02", "04", "06", "07", "08"]
    assert prepare.answers(prepared.validation) == ["03", "90", "05"]
    assert prepare.summary("train", "leaked", "rejected") == (7, 2, 0)
    assert [(row["line"], row["reason"].rpartition("/")[2]) for row in prepare.rejects()] == [
        (4, "validation.jsonl, line 1, which is held out"),
        (6, "validation.jsonl, line 3, which is held out"),
    ]
    assert prepare.manifest["warnings"] == []


def test_leakage_can_be_ignored(prepare: Prepare, tmp_path: Path) -> None:
    prepare(leaking(tmp_path), validation=VALIDATION, preparation={"leakage": "ignore"})
    assert (prepare.summary("leaked"), prepare.manifest["warnings"]) == ((0,), [])


def test_where_all_leak_none_is_left(prepare: Prepare, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "validation.jsonl", *rows(0, 1))
    with pytest.raises(JobError, match="without them none is left"):
        prepare(rows(0, 1), validation=VALIDATION, preparation={"leakage": "drop"})


def test_what_is_held_out_of_the_same_rows_may_leak(prepare: Prepare) -> None:
    """Each row is there twice."""
    prepared = prepare(rows(*range(10), *range(10)), spec={"training": {"seed": 1}}, validation={"fraction": 0.1})
    held = prepare.answers(prepared.validation)
    assert len(set(held)) == 2
    assert prepare.summary("train", "validation", "leaked") == (18, 2, 2)


SUITE = {"name": "task", "source": "test", "metrics": ["exactMatch"]}


def test_a_test_fraction_with_its_texts(prepare: Prepare) -> None:
    """The texts are those of the examples, in their order, and of nothing that is trained on."""
    spec = {"evaluation": {"suites": [SUITE]}, "training": {"seed": 5}}
    prepared = prepare(rows(*range(20)), spec=spec, validation={"fraction": 0.1}, test={"fraction": 0.2})
    assert prepare.summary("train", "validation", "test") == (14, 2, 4)
    assert prepared.test is not None
    for split, examples in (("validation", prepared.validation), ("test", prepared.test)):
        cases = prepare.cases(split)
        assert [case.reference for case in cases] == prepare.answers(examples)
        assert [case.prompt for case in cases] == [f"{words(int(case.reference))}? " for case in cases]
        assert [case.id for case in cases] == [f"{number:06d}" for number in range(len(cases))]
        assert [case.place.rpartition(" ")[2] for case in cases] == [str(int(case.reference) + 1) for case in cases]
    assert prepare.cases("train") == []
    everywhere = [answer for examples in prepared.splits().values() for answer in prepare.answers(examples)]
    assert sorted(everywhere) == [f"{number:02}" for number in range(20)]


def test_without_a_suite_or_baseline_no_texts_are_kept(prepare: Prepare) -> None:
    prepare(rows(*range(10)), test={"fraction": 0.2})
    assert not list(prepare.out.glob("*.jsonl"))


@pytest.mark.parametrize("held", [{"fraction": 0.2}, VALIDATION], ids=["a fraction", "its own"])
def test_a_baseline_that_shows_examples_has_texts_to_train_on(prepare: Prepare, validation: dict[str, str], held: dict[str, Any]) -> None:
    spec = {"baseline": {"prompts": [{"name": "few", "examples": 2}]}, "evaluation": {"suites": [SUITE | {"source": "validation"}]}}
    prepared = prepare(rows(*range(10)), spec=spec, validation=held)
    assert [case.reference for case in prepare.cases("train")] == prepare.answers(prepared.train)
    assert [case.reference for case in prepare.cases("validation")] == prepare.answers(prepared.validation)


def test_left_out_rows_have_no_texts(prepare: Prepare, tmp_path: Path) -> None:
    train = [*rows(0, 0, 1), {"prompt": "0" * 100, "completion": "a"}, *rows(2, 3, 4, 5)]
    spec = {"evaluation": {"suites": [SUITE]}, "training": {"maxSequenceLength": 64}}
    prepared = prepare(train, spec=spec, test={"fraction": 0.4}, preparation={"deduplicate": "exact"})
    assert prepared.test is not None
    assert [case.reference for case in prepare.cases("test")] == prepare.answers(prepared.test)


def test_rows_of_a_group_are_on_one_side(prepare: Prepare) -> None:
    """Ten customers with three rows each: a fifth is two customers."""
    train = [row | {"customer": number % 10} for number, row in enumerate(rows(*range(30)))]
    prepared = prepare(train, groupBy="customer", validation={"fraction": 0.2}, test={"fraction": 0.1})
    sides = [{int(answer) % 10 for answer in prepare.answers(examples)} for examples in prepared.splits().values()]
    assert [len(side) for side in sides] == [7, 2, 1]
    assert prepare.summary("train", "validation", "test") == (21, 6, 3)


@pytest.mark.parametrize("leakage", ["ignore", "warn", "drop", "fail"])
def test_a_group_that_validation_data_of_its_own_has_too(leakage: str, prepare: Prepare) -> None:
    """Customers 0 to 4 with two rows each, and two of them once more in a validation file."""
    write_jsonl(prepare.folder / "validation.jsonl", *(row | {"customer": number} for number, row in enumerate(rows(50, 51), start=3)))
    train = [row | {"customer": number % 5} for number, row in enumerate(rows(*range(10)))]
    data = {"groupBy": "customer", "validation": VALIDATION, "preparation": {"leakage": leakage}}
    told = r"data.groupBy: 4 of 10 training examples have a value of customer that data.validation has too.*train.jsonl, line 4"
    if leakage == "fail":
        with pytest.raises(JobError, match=told):
            prepare(train, **data)
        return
    prepared = prepare(train, **data)
    assert prepare.summary("train", "validation", "leaked") == ((6, 2, 4) if leakage == "drop" else (10, 2, 0))
    assert {int(answer) % 5 for answer in prepare.answers(prepared.train)} == ({0, 1, 2} if leakage == "drop" else set(range(5)))
    warnings = prepare.manifest["warnings"]
    assert len(warnings) == (leakage == "warn")
    assert all(re.search(told, warning) for warning in warnings)
    assert [row["line"] for row in prepare.rejects()] == ([4, 5, 9, 10] if leakage == "drop" else [])


def test_a_row_without_its_group_cannot_be_used(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"lines 1, 4: the column customer, by which data.groupBy keeps rows together, is missing or null"):
        prepare([*rows(0), *rows(1, 2, customer="a"), *rows(3, customer=None)], groupBy="customer")


def test_suites_have_examples_and_texts_of_their_own(prepare: Prepare, tmp_path: Path) -> None:
    """One is of plain texts while the job's rows are not, one has a limit."""
    write_jsonl(tmp_path / "general.jsonl", {"text": words(50)}, {"text": words(51)})
    write_jsonl(tmp_path / "more.jsonl", *rows(60, 61, 62))
    suites = [
        {"name": "general", "source": "file://{folder}/general.jsonl", "role": "forgetting", "metrics": ["loss"]},
        {"name": "more", "source": "file://{folder}/more.jsonl", "metrics": ["f1"], "limit": 2},
        SUITE,
    ]
    prepared = prepare(rows(*range(10)), spec={"evaluation": {"suites": suites}}, test={"fraction": 0.2})
    assert list(prepared.suites) == ["general", "more"]
    assert list(prepared.splits()) == ["train", "validation", "test"]
    assert prepare.manifest["splits"] == ["train", "validation", "test", "suite-general", "suite-more"]
    assert prepare.answers(prepared.suites["general"]) == [words(50), words(51)]
    assert [(case.prompt, case.reference) for case in prepare.cases("suite-general")] == [(words(50), ""), (words(51), "")]
    assert prepare.answers(prepared.suites["more"]) == ["60", "61"]
    assert [case.reference for case in prepare.cases("suite-more")] == ["60", "61"]


def test_a_suite_may_have_its_own_columns_whatever_the_jobs_are(prepare: Prepare, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "more.jsonl", *rows(60))
    suites = [{"name": "more", "source": "file://{folder}/more.jsonl", "metrics": ["f1"]}]
    train = [{"question": words(number), "answer": str(number)} for number in range(4)]
    spec = {"evaluation": {"suites": suites}}
    prepared = prepare(train, spec=spec, format="promptCompletion", columns={"prompt": "question", "completion": "answer"})
    assert prepare.answers(prepared.suites["more"]) == ["60"]


def test_of_a_suites_preferences_the_better_answer_is_asked_for(prepare: Prepare, tmp_path: Path) -> None:
    """The job's own pairs stay pairs."""
    pairs = [{"prompt": words(number), "chosen": f"yes {number}", "rejected": f"no {number}"} for number in range(6)]
    write_jsonl(tmp_path / "pairs.jsonl", {"prompt": words(70), "chosen": "good", "rejected": "bad"})
    write_jsonl(tmp_path / "plain.jsonl", *rows(60))
    suites = [{"name": name, "source": f"file://{{folder}}/{name}.jsonl", "metrics": ["f1"]} for name in ("pairs", "plain")]
    spec = {"objective": {"dpo": {}}, "evaluation": {"suites": suites}}
    prepared = prepare(pairs, spec=spec, validation={"fraction": 0.2})
    assert (prepared.train.group, prepared.train.groups, prepared.validation.groups) == (2, 5, 1)
    assert {name: (examples.group, prepare.answers(examples)) for name, examples in prepared.suites.items()} == {
        "pairs": (1, ["good"]),
        "plain": (1, ["60"]),
    }
    assert [case.reference for case in prepare.cases("validation")] == [prepare.answers(prepared.validation)[0]]


def test_a_suites_faults_name_it(prepare: Prepare, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "more.jsonl", {"prompt": "q"})
    suites = [{"name": "more", "source": "file://{folder}/more.jsonl", "metrics": ["f1"]}]
    with pytest.raises(JobError, match=r"evaluation.suites.more: 1 row cannot be used. \S+more.jsonl, line 1: the columns are prompt, not"):
        prepare(rows(0, 1), spec={"evaluation": {"suites": suites}})


def test_leakage_into_a_suite_is_found(prepare: Prepare, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "more.jsonl", *rows(2))
    suites = [{"name": "more", "source": "file://{folder}/more.jsonl", "metrics": ["f1"]}]
    prepare(rows(*range(9)), spec={"evaluation": {"suites": suites}, "training": {"seed": 1}}, validation={"fraction": 0.1})
    assert "an example that is measured (the suite more)" in prepare.manifest["warnings"][0]


POINTS = {"knowledgeBase": {"source": "file://{folder}/kb"}, "goldenOutputs": {"source": "file://{folder}/golden.jsonl"}}


def test_what_is_made_is_added_to_the_training_data(prepare: Prepare, validation: dict[str, str]) -> None:
    made = Counted(4, {"prompt": "Write about heat. ", "completion": "It is warm. " * 60})
    preparation = {"contentPoints": POINTS, "deduplicate": "exact"}
    prepared = prepare(rows(0, 1), made=made, validation=validation, preparation=preparation)
    assert [answer[:11] for answer in prepare.answers(prepared.train)] == ["00", "01", "It is warm."]
    assert prepare.summary("train", "made", "duplicates") == (3, 4, 3)
    sample = "Write about heat.  -> " + ("It is warm. " * 60)[:400]
    assert prepare.summary("madeSamples") == ([sample] * 3,)
    assert [(row["data"], row["file"], row["line"]) for row in prepare.rejects()] == [("data.preparation", "rows", n) for n in (2, 3, 4)]


def test_what_is_made_may_be_all_and_needs_no_group(prepare: Prepare, validation: dict[str, str]) -> None:
    made = Counted(5, {"prompt": "Write. ", "completion": "Warm."})
    prepared = prepare(None, made=made, preparation={"contentPoints": POINTS}, groupBy="customer", validation={"fraction": 0.2})
    assert (len(prepared.train), len(prepared.validation)) == (4, 1)
    assert MADE not in prepare.manifest["splits"]


def test_where_nothing_was_made_there_is_nothing_to_train_on(prepare: Prepare, validation: dict[str, str]) -> None:
    with pytest.raises(JobError, match=r"data: there is no example to train on") as caught:
        prepare(None, made=Counted(0, {}), preparation={"contentPoints": POINTS}, validation=validation)
    assert caught.value.reason == Reason.DATASET_INVALID


def test_the_texts_are_not_held(prepare: Prepare, validation: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a chunk that is read, one that is cut into tokens, one that is written."""
    monkeypatch.setattr(encoding, "CHUNK", 10)
    made = Counted(1000, {"prompt": "Write. ", "completion": "Warm."})
    spec = {"evaluation": {"suites": [SUITE]}}
    prepare(None, spec=spec, made=made, preparation={"contentPoints": POINTS}, test={"fraction": 0.2}, validation=validation)
    assert 10 < made.most <= 3 * 10 + 1
    assert len(prepare.cases("test")) == 200


def test_how_long_the_training_examples_are(prepare: Prepare, validation: dict[str, str]) -> None:
    """A byte is a token, and one ends each: lengths of 4 to 23."""
    prepare([{"prompt": "q" * number, "completion": "ab"} for number in range(1, 21)], validation=validation)
    assert prepare.summary("tokensPerExample") == ({"min": 4, "median": 13, "p95": 22, "max": 23},)
