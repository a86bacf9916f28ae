import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.prepared_data import prepare_data
from tiny_models import job_manifest, write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.data import encoding
from finetune_trainer.data.examples import Examples, Prepared
from finetune_trainer.data.prepare import inputs_of, write_data
from finetune_trainer.data.rows import Place, Row
from finetune_trainer.errors import JobError
from finetune_trainer.model import inspect_model, longest_example
from finetune_trainer.model_files import fetch_model
from finetune_trainer.sources import Mounts


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"{number}: ", "completion": f"answer {number}"}


def job(folder: Path, training: dict[str, object] | None = None, **data: object) -> FineTuneJob:
    whole = {"train": {"source": f"file://{folder}/train.jsonl"}} | data
    return parse_job(job_manifest(data=whole, training=training or {}), local=True)


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    def prepare(training: dict[str, object] | None = None, longest: int | None = None, **data: object) -> Prepared:
        return prepare_data(job(tmp_path, training, **data), tokenizer, Mounts(tmp_path, local=True), longest)

    return prepare


def texts(examples: Examples, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(examples.example(index)[0].tolist()) for index in range(len(examples))]


def test_a_fraction_is_held_out_by_the_seed(tmp_path: Path, prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    write_jsonl(tmp_path / "train.jsonl", *(pair(number) for number in range(20)))
    first, again, other = prepare({"seed": 1}), prepare({"seed": 1}), prepare({"seed": 2})
    assert (len(first.train), len(first.validation), first.test) == (18, 2, None)
    both = sorted(texts(first.train, tokenizer) + texts(first.validation, tokenizer))
    assert both == sorted(f"{number}: answer {number}<eos>" for number in range(20))
    assert first.digest == again.digest != other.digest
    assert texts(first.validation, tokenizer) != texts(other.validation, tokenizer)


def test_splits_of_their_own(tmp_path: Path, prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    write_jsonl(tmp_path / "train.jsonl", pair(1))
    write_jsonl(tmp_path / "validation.jsonl", pair(2), pair(3))
    write_jsonl(tmp_path / "test.jsonl", pair(4))
    prepared = prepare(validation={"source": f"file://{tmp_path}/validation.jsonl"}, test={"source": f"file://{tmp_path}/test.jsonl"})
    assert [texts(examples, tokenizer) for examples in prepared.splits().values()] == [
        ["1: answer 1<eos>"],
        ["2: answer 2<eos>", "3: answer 3<eos>"],
        ["4: answer 4<eos>"],
    ]


def test_the_counts_are_in_the_manifest(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of the training data one is too long and 1 of 4 is held out; each has 11 characters and an end token."""
    write_jsonl(tmp_path / "train.jsonl", *(pair(number) for number in range(4)), {"prompt": "0" * 100, "completion": "a"})
    write_jsonl(tmp_path / "test.jsonl", pair(4), pair(5))
    spec = job(tmp_path, {"maxSequenceLength": 64}, validation={"fraction": 0.25}, test={"source": f"file://{tmp_path}/test.jsonl"})
    (tmp_path / "prepared").mkdir()
    manifest = write_data(tmp_path / "prepared", spec, inputs_of(spec, Mounts(tmp_path, local=True)), tokenizer)
    assert json.loads((tmp_path / "prepared" / "manifest.json").read_text()) == manifest
    lengths = {"min": 12, "median": 12, "p95": 12, "max": 12}
    checked = {"duplicates": 0, "leaked": 0, "made": 0, "madeSamples": [], "tokensPerExample": lengths}
    assert manifest["summary"] == {"train": 3, "validation": 1, "test": 2, "tokens": 36, "rejected": 1, **checked}
    names = {"-".join((split, part)) for split in ("train", "validation", "test") for part in ("tokens", "labelled", "offsets")}
    files = {f"{name}.npy" for name in names} | {"manifest.json", "rejects.jsonl"}
    assert {path.name for path in (tmp_path / "prepared").iterdir()} == files


def test_a_config_map(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "configmaps" / "support").mkdir(parents=True)
    write_jsonl(tmp_path / "configmaps" / "support" / "train.jsonl", pair(1), pair(2))
    manifest = job_manifest(data={"train": {"configMap": {"name": "support", "key": "train.jsonl"}}})
    prepared = prepare_data(parse_job(manifest, local=True), tokenizer, Mounts(tmp_path))
    assert (len(prepared.train), len(prepared.validation)) == (1, 1)


def test_bad_rows_are_shown_and_counted(tmp_path: Path, prepare) -> None:
    rows = [pair(0), {"prompt": 0}, {"text": ""}, *({"prompt": number} for number in range(5)), pair(1)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{cut off")
    with pytest.raises(JobError) as caught:
        prepare()
    assert caught.value.reason == Reason.DATASET_INVALID
    uri = f"file://{tmp_path}/train.jsonl"
    assert caught.value.message == (
        f"data.train: 8 rows cannot be used. {uri}, lines 2, 4, 5, 6: the column completion is missing; the row has prompt; "
        f"{uri}, line 3: the column prompt is missing; the row has text; and 3 more such rows"
    )


def test_one_bad_row(tmp_path: Path, prepare) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(pair(0)) + "\n{cut off\n")
    with pytest.raises(JobError, match=r"data.train: 1 row cannot be used. .*train.jsonl, line 2: the row is not JSON"):
        prepare()


def test_the_split_at_fault_is_named(tmp_path: Path, prepare) -> None:
    write_jsonl(tmp_path / "train.jsonl", pair(1), pair(2))
    with pytest.raises(JobError, match=r"no-such\.jsonl does not exist") as caught:
        prepare(test={"source": f"file://{tmp_path}/no-such.jsonl"})
    assert caught.value.reason == Reason.DATASET_NOT_FOUND


def test_the_first_row_decides_the_format_and_the_rest_must_follow(tmp_path: Path, prepare) -> None:
    write_jsonl(tmp_path / "train.jsonl", pair(1), {"text": "a"})
    with pytest.raises(JobError, match="line 2: the column prompt is missing; the row has text"):
        prepare()


def test_a_format_that_the_columns_do_not_have(tmp_path: Path, prepare) -> None:
    write_jsonl(tmp_path / "train.jsonl", pair(1))
    with pytest.raises(JobError, match="line 1: the column messages is missing; the row has prompt, completion"):
        prepare(format="messages")


def test_renamed_columns(tmp_path: Path, prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    write_jsonl(tmp_path / "train.jsonl", *[{"question": "q", "answer": "a"}] * 2)
    prepared = prepare(columns={"prompt": "question", "completion": "answer"})
    assert texts(prepared.train, tokenizer) == ["qa<eos>"]


def test_examples_without_a_label_left_are_rejected_and_counted(tmp_path: Path, prepare) -> None:
    write_jsonl(tmp_path / "train.jsonl", {"prompt": "0123456789", "completion": "a"}, {"prompt": "", "completion": "b"}, pair(1))
    prepared = prepare({"maxSequenceLength": 10})
    assert (len(prepared.train) + len(prepared.validation), prepared.rejected) == (2, 1)


def test_where_none_has_a_label_left_the_data_is_refused(tmp_path: Path, prepare) -> None:
    write_jsonl(tmp_path / "train.jsonl", *[{"prompt": "0123456789", "completion": "abc"}] * 3)
    with pytest.raises(JobError) as caught:
        prepare({"maxSequenceLength": 8})
    assert caught.value.reason == Reason.DATASET_INVALID
    assert caught.value.message == (
        f"data.train: file://{tmp_path}/train.jsonl, line 1: no token that counts in the loss is within training.maxSequenceLength "
        "(8; the example has 14), and so in all 3 rows"
    )


def test_an_example_that_is_longer_than_the_model_takes(tmp_path: Path, prepare) -> None:
    write_jsonl(tmp_path / "train.jsonl", pair(1), {"prompt": "0" * 50, "completion": "a"})
    with pytest.raises(JobError, match=r"line 2 has 52 tokens and the model takes 32: set .* to at most 32") as caught:
        prepare({"maxSequenceLength": 64}, longest=32)
    assert caught.value.reason == Reason.INVALID_SPEC
    assert len(prepare({"maxSequenceLength": 64}, longest=52).train) == 1


def test_one_example_cannot_be_split(tmp_path: Path, prepare) -> None:
    write_jsonl(tmp_path / "train.jsonl", pair(1))
    with pytest.raises(JobError, match="one example is too few"):
        prepare()


def test_the_digest_is_of_what_is_learnt(tmp_path: Path, prepare) -> None:
    write_jsonl(tmp_path / "train.jsonl", pair(1), pair(2))
    base = prepare().digest
    write_jsonl(tmp_path / "train.jsonl", *(row | {"note": "not used"} for row in (pair(1), pair(2))))
    assert prepare().digest == base
    write_jsonl(tmp_path / "train.jsonl", pair(1), pair(3))
    assert prepare().digest != base


class Counted:
    """Rows without end in sight; their places live as long as anything of them, so that they can be counted."""

    def __init__(self, number: int, columns: dict[str, str]) -> None:
        self.number, self.columns, self.most, self._alive = number, columns, 0, weakref.WeakSet[Place]()

    def rows(self) -> Iterator[Row]:
        for number in range(1, self.number + 1):
            place = Place("rows", number)
            self._alive.add(place)
            self.most = max(self.most, len(self._alive))
            yield Row(place, self.columns)

    def identity(self) -> list[str]:
        return []

    def state(self) -> list[str]:
        return []


def most_at_once(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int, text: str = "abc") -> int:
    counted = Counted(rows, {"text": text})
    folder.mkdir()
    write_data(folder, job(folder), {"train": counted}, tokenizer)
    return counted.most


def test_what_is_held_does_not_grow_with_the_data(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that is read, one that is cut into tokens, one that is written."""
    monkeypatch.setattr(encoding, "CHUNK", 10)
    few, many = (most_at_once(tmp_path / str(rows), tokenizer, rows) for rows in (100, 2000))
    assert 10 < few <= many <= 3 * 10 + 1


def test_long_texts_are_held_in_smaller_numbers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand characters fill a chunk, whatever the number of examples."""
    monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", 1000)
    assert most_at_once(tmp_path / "long", tokenizer, 200, "abcde" * 100) <= 3 * 2 + 1


def test_what_is_left_out_is_not_held(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows with nothing to learn only the first is told of."""
    monkeypatch.setattr(encoding, "CHUNK", 10)
    counted = Counted(500, {"prompt": "0123456789", "completion": "a"})
    with pytest.raises(JobError, match="so in all 500 rows"):
        write_data(tmp_path, job(tmp_path, {"maxSequenceLength": 8}), {"train": counted}, tokenizer)
    assert counted.most <= 3 * 10 + 2


def test_a_pair_stays_together(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The answers to one prompt are both held out or both trained on, the chosen one first; of one that is too long neither is taken."""
    rows = [{"prompt": f"{n:02}", "chosen": f"yes {n:02}", "rejected": f"no {n:02}"} for n in range(10)]
    write_jsonl(
        tmp_path / "train.jsonl",
        *rows,
        {"prompt": "10", "chosen": "yes", "rejected": "n" * 5},
        {"prompt": "0" * 90, "chosen": "a", "rejected": "b"},
    )
    manifest = job_manifest(
        data={"train": {"source": f"file://{tmp_path}/train.jsonl"}, "validation": {"fraction": 0.3}},
        objective={"dpo": {}},
        training={"maxSequenceLength": 32},
    )
    prepared = prepare_data(parse_job(manifest, local=True), tokenizer, Mounts(tmp_path, local=True))
    assert (prepared.train.group, prepared.train.groups, prepared.validation.groups, prepared.rejected) == (2, 8, 3, 1)
    for examples in (prepared.train, prepared.validation):
        whole = texts(examples, tokenizer)
        for chosen, rejected in zip(whole[::2], whole[1::2], strict=True):
            assert chosen[2:5] == "yes"
            assert rejected[2] == "n"
            assert chosen[:2] == rejected[:2]


def test_the_quickstarts_model_and_data() -> None:
    """The files of the repository, whose chat template marks what is generated."""
    examples = Path(__file__).parents[3] / "examples"
    splits = {split: {"source": f"file://{examples}/data/support/{split}.jsonl"} for split in ("train", "validation", "test")}
    spec = parse_job(job_manifest(model={"source": f"file://{examples}/models/tiny-llama"}, data=splits), local=True)
    mounts = Mounts(Path("/nowhere"), local=True)
    files = fetch_model(spec.spec.model, mounts, Path("/nowhere"), weights=False)
    tokenizer = inspect_model(files, spec).tokenizer
    prepared = prepare_data(spec, tokenizer, mounts, longest_example(files))
    assert prepared.rejected == 0
    for split, examples_of_split in prepared.splits().items():
        rows = [json.loads(line) for line in (examples / "data" / "support" / f"{split}.jsonl").read_text().splitlines()]
        for index, row in enumerate(rows):
            tokens, labelled = examples_of_split.example(index)
            assert tokenizer.decode(tokens[labelled].tolist()) == row["messages"][-1]["content"] + tokenizer.eos_token
