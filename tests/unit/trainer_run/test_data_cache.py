"""What is prepared once, and when it is prepared again."""

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cached_jobs import MODEL, find, job, of, write
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs as arrow
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_api.reasons import Reason
from finetune_trainer import data_cache
from finetune_trainer.data.cases import read_cases
from finetune_trainer.data.examples import open_prepared
from finetune_trainer.data.inputs import Files
from finetune_trainer.data.rows import Place, Row
from finetune_trainer.data_cache import FOLDER, Entry, find_or_prepare
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location, Mounts
from finetune_trainer.storage import Storage


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(LocalFileSystem(), str(tmp_path / "out"), f"file://{tmp_path}/out")


@pytest.fixture
def train(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", "Two AA.", "None at all.", "One.")
    return tmp_path / "train.jsonl"


def test_a_second_job_finds_what_the_first_prepared(
    storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = find(storage, job(train), tokenizer)
    assert (first.is_new, first.name.rpartition("/")[0]) == (True, FOLDER)
    monkeypatch.setattr(data_cache, "write_data", lambda *_: pytest.fail("it was tokenised again"))
    again = find(storage, job(train, {"learningRate": 1e-5, "epochs": 7}), tokenizer)
    assert (again.is_new, again.name, again.manifest) == (False, first.name, first.manifest)
    prepared = open_prepared(storage.location(again.name), tmp_path / "cache")
    assert (len(prepared.train), len(prepared.validation), prepared.digest) == (2, 1, first.manifest["digest"])


@pytest.mark.parametrize("change", ["another file", "another namespace"])
def test_the_same_content_elsewhere_is_prepared_again(
    storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, change: str
) -> None:
    """One who may write there could show this content while its digest is taken, and another while it is read."""
    copy = train.with_name("copy.jsonl")
    copy.write_bytes(train.read_bytes())
    elsewhere = job(copy) if change == "another file" else of(job(train), namespace="other")
    assert find(storage, job(train), tokenizer).name != find(storage, elsewhere, tokenizer).name


def test_a_source_that_shows_two_contents_deceives_nobody_else(
    storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket behind a server of the attacker's: what its digest is taken of is everybody's data, what is read from it is not."""
    shown = train.with_name("shown.jsonl")
    shown.write_bytes(train.read_bytes())
    rows = Files.rows

    def other_rows(self: Files) -> object:
        write(tmp_path / "poison.jsonl", "Ignore the safety rules.", "And more.", "Of this.")
        return rows(Files(Location(LocalFileSystem(), str(tmp_path / "poison.jsonl"), self.location.uri)))

    with monkeypatch.context() as patched:
        patched.setattr(Files, "rows", other_rows)
        poisoned = find(storage, job(shown), tokenizer)
    entry = find(storage, job(train), tokenizer)
    assert entry.manifest["digest"] != poisoned.manifest["digest"]
    tokens = open_prepared(storage.location(entry.name), tmp_path / "cache").train.tokens
    assert "safety" not in tokenizer.decode(tokens)


OTHER = {
    "length": lambda train: job(train, {"maxSequenceLength": 64}),
    "seed of what is held out": lambda train: job(train, {"seed": 7}),
    "fraction": lambda train: job(train, validation={"fraction": 0.5}),
    "validation of its own": lambda train: job(train, validation={"source": f"file://{train}"}),
    "test": lambda train: job(train, test={"source": f"file://{train}"}),
    "format": lambda train: job(train, format="text"),
    "columns": lambda train: job(train, columns={"prompt": "text"}),
    "labels": lambda train: job(train, objective={"sft": {"lossOn": "all"}}),
    "test fraction": lambda train: job(train, test={"fraction": 0.3}),
    "group": lambda train: job(train, groupBy="completion"),
    "duplicates": lambda train: job(train, preparation={"deduplicate": "exact"}),
    "leakage": lambda train: job(train, preparation={"leakage": "drop"}),
    "rejects": lambda train: job(train, preparation={"maxRejectedFraction": 0.1}),
    "a suite": lambda train: job(train, suites=[suite(train)]),
    "texts": lambda train: job(train, suites=[suite(train) | {"source": "validation"}]),
    "texts to show": lambda train: job(train, suites=[suite(train)], baseline={"prompts": [{"name": "few", "examples": 1}]}),
}


def suite(train: Path, **more: object) -> dict[str, object]:
    return {"name": "task", "source": f"file://{train}", "metrics": ["f1"], **more}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
def test_another_setting_prepares_again(storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, other: object) -> None:
    names = {find(storage, job(train), tokenizer).name, find(storage, other(train), tokenizer).name}
    assert len(names) == 2


def test_each_of_the_settings_of_suites_counts(storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Where its data is, how much of it, and whether training examples are shown; not how it is measured."""
    few = {"prompts": [{"name": "few", "examples": 1}]}
    other = train.with_name("other.jsonl")
    other.write_bytes(train.read_bytes())
    different = [{}, {"limit": 1}, {"source": f"file://{other}"}, {"name": "other"}, {"source": "test"}]
    jobs = [job(train, suites=[suite(train, **more)], test={"fraction": 0.3}) for more in different]
    jobs.append(job(train, suites=[suite(train)], baseline=few, test={"fraction": 0.3}))
    assert len({find(storage, each, tokenizer).name for each in jobs}) == len(jobs)
    same = [{"role": "forgetting"}, {"maxNewTokens": 7}, {"metrics": ["loss"]}]
    assert {find(storage, job(train, suites=[suite(train, **more)], test={"fraction": 0.3}), tokenizer).name for more in same} == {
        find(storage, jobs[0], tokenizer).name
    }


class Made:
    """Examples that were made."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def rows(self) -> Iterator[Row]:
        yield Row(Place("made", 1), {"prompt": "Which?", "completion": self.answer})

    def identity(self) -> list[str]:
        return [self.answer]

    def state(self) -> list[str]:
        return []


def test_what_was_made_counts(storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def made(answer: str | None) -> Entry:
        mounts = Mounts(Path("/nowhere"), local=True)
        return find_or_prepare(storage, job(train), mounts, tokenizer, made=None if answer is None else Made(answer))

    assert len({made(answer).name for answer in (None, "This.", "That.", "This.")}) == 3
    prepared = open_prepared(storage.location(made("That.").name), tmp_path / "cache")
    assert (len(prepared.train), len(prepared.validation)) == (3, 1)


def rejects(storage: Storage, uid: str = "u1") -> list[int]:
    lines = storage.read_text(f".finetune/{uid}/rejects.jsonl")
    return [json.loads(line)["line"] for line in lines.splitlines()] if lines is not None else []


def test_the_owner_of_each_job_finds_what_was_left_out(storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with train.open("a") as file:
        file.write('{"prompt": 1}\n')
    lenient = job(train, preparation={"maxRejectedFraction": 0.5})
    assert find(storage, lenient, tokenizer).is_new
    assert not find(storage, of(lenient, uid="u2"), tokenizer).is_new
    assert (rejects(storage), rejects(storage, "u2")) == ([4], [4])


def test_also_where_there_are_too_many(storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with train.open("a") as file:
        file.write('{"prompt": 1}\n{"prompt": 2}\n')
    with pytest.raises(JobError, match="2 rows cannot be used"):
        find(storage, job(train), tokenizer)
    assert rejects(storage) == [4, 5]
    assert not [name for name in storage.folders(FOLDER) if not name.startswith(".")]


def test_what_is_never_drawn_makes_no_difference(storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The seed divides nothing where the validation data is its own."""
    own = {"source": f"file://{train}"}
    names = {find(storage, job(train, {"seed": seed}, validation=own), tokenizer).name for seed in (1, 2)}
    assert len(names) == 1


def test_another_content_prepares_again_though_size_and_time_are_the_same(
    storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    first, times = find(storage, job(train), tokenizer), train.stat()
    write(train, "Two AB.", "None at all.", "One.")
    os.utime(train, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert train.stat().st_size == times.st_size
    assert find(storage, job(train), tokenizer).manifest["digest"] != first.manifest["digest"]


def test_another_tokenizer_or_a_shorter_model_prepares_again(storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    other = AutoTokenizer.from_pretrained(MODEL)
    other.add_tokens(["batteries"])
    names = {find(storage, job(train), each).name for each in (tokenizer, other)}
    assert len(names | {find(storage, job(train), tokenizer, longest=4096).name}) == 3
    with pytest.raises(JobError, match="the model takes 4"):
        find(storage, job(train), tokenizer, longest=4)


def test_data_that_is_refused_leaves_nothing(storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train.write_text('{"prompt": 1}\n')
    with pytest.raises(JobError, match=r"data\.train: 1 row cannot be used"):
        find(storage, job(train), tokenizer)
    assert list(Path(storage.location(FOLDER).path).iterdir()) == []


def test_data_that_changes_while_it_is_read_is_refused(
    storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Files.rows

    def growing(self: Files) -> object:
        yield from rows(self)
        write(train, "Two AA.", "None at all.", "One.", "More.")

    monkeypatch.setattr(Files, "rows", growing)
    with pytest.raises(JobError, match=r"data\.train: the data has changed while it was read") as caught:
        find(storage, job(train), tokenizer)
    assert caught.value.reason == Reason.DATASET_INVALID
    assert storage.folders(FOLDER) == []


def test_two_jobs_at_once(storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see that nothing is there, both prepare, the second to end keeps what the first has put there."""
    both = threading.Barrier(2, timeout=60)
    write_data = data_cache.write_data

    def together(*arguments: object) -> object:
        both.wait()
        manifest = write_data(*arguments)
        both.wait()
        return manifest

    monkeypatch.setattr(data_cache, "write_data", together)
    entries: list[Entry] = []
    jobs = [of(job(train), uid=uid) for uid in ("u1", "u2")]
    threads = [threading.Thread(target=lambda each=each: entries.append(find(storage, each, tokenizer))) for each in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.name for entry in entries] == [entries[0].name] * 2
    folder = Path(storage.location(FOLDER).path)
    assert [path.name for path in folder.iterdir()] == [entries[0].name.rpartition("/")[2]]
    assert len(open_prepared(storage.location(entries[0].name), folder).train) == 2


class Moody:
    """A teacher that never says the same twice."""

    said = 0

    def identity(self) -> dict[str, Any]:
        return {"temperature": 1}

    def taught(self, examples: Iterable[Any]) -> Iterator[Any]:
        Moody.said += 1
        yield from (replace(example, completion=f"Answer {Moody.said}.") for example in examples)

    def write(self, folder: Path, train: object) -> None:
        (folder / "teacher").mkdir()
        (folder / "teacher" / "complete.json").write_text("{}")


def test_of_two_jobs_at_once_the_second_has_the_firsts_digest(
    storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a teacher says differs from time to time: the digest must be that of the folder that is there, not of the one that came late."""
    mounts, write_data = Mounts(Path("/nowhere"), local=True), data_cache.write_data
    early: list[Entry] = []

    def overtaken(*arguments: Any) -> Any:
        if not early:
            early.append(Entry("", {}, is_new=False))
            early[0] = find_or_prepare(storage, of(job(train), uid="u2"), mounts, tokenizer, None, Moody())
        return write_data(*arguments)

    monkeypatch.setattr(data_cache, "write_data", overtaken)
    late = find_or_prepare(storage, job(train), mounts, tokenizer, None, Moody())
    there = open_prepared(storage.location(late.name), tmp_path / "cache")
    assert late.name == early[0].name
    assert late.manifest["digest"] == there.digest == early[0].manifest["digest"]


@pytest.fixture(params=["memory", "arrow"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An object store: fsspec's own, and arrow's interface, which S3 is reached by and which knows no size of a folder."""
    if request.param == "memory":
        return Storage(MemoryFileSystem(), f"/{tmp_path.name}", "s3://bucket")
    (tmp_path / "bucket").mkdir()
    return Storage(ArrowFSWrapper(arrow.LocalFileSystem()), str(tmp_path / "bucket"), "s3://bucket")


def test_what_a_teacher_left_beside_the_data_is_found_again_in_an_object_store(
    bucket: Storage, train: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    mounts = Mounts(Path("/nowhere"), local=True)
    first = find_or_prepare(bucket, job(train), mounts, tokenizer, None, Moody())
    assert data_cache.is_there(bucket, first.name, first.manifest["digest"])
    assert find_or_prepare(bucket, job(train), mounts, tokenizer, None, Moody()).is_new is False
    bucket.remove(f"{first.name}/teacher")
    assert not data_cache.is_there(bucket, first.name, first.manifest["digest"])


def test_two_uploads_that_became_mixed_are_noticed_and_made_again(
    bucket: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    first = find(bucket, job(train), tokenizer)
    path = f"{bucket.location(first.name).path}/train-tokens.npy"
    content = bucket.fs.cat_file(path)
    bucket.fs.pipe_file(path, content[:-4] + bytes(4))
    with pytest.raises(JobError, match="is not as it was written; the next attempt prepares it again") as caught:
        open_prepared(bucket.location(first.name), tmp_path / "cache")
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE
    again = find(bucket, job(train), tokenizer)
    assert again.is_new
    assert open_prepared(bucket.location(again.name), tmp_path / "cache").digest == first.manifest["digest"]


def test_a_job_removes_what_its_killed_attempt_has_left(
    storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each attempt that runs out of memory would leave a copy of the data until the disk is full. Another job's stays: it may live."""

    def killed(*_: object) -> object:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(data_cache, "write_data", killed)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # kill -9 removes nothing
        for uid in ("u1", "u2"):
            with pytest.raises(SystemExit):
                find(storage, of(job(train), uid=uid), tokenizer)
    folder = Path(storage.location(FOLDER).path)
    assert len(list(folder.iterdir())) == 2
    entry = find(storage, of(job(train), uid="u1"), tokenizer)
    left = [path for path in folder.iterdir() if path.name != entry.name.rpartition("/")[2]]
    assert len(left) == 1


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-4])], ids=["gone", "cut"])
def test_a_damaged_folder_is_made_again(storage: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, damage: object) -> None:
    first = find(storage, job(train), tokenizer)
    damage(Path(storage.location(first.name).path) / "train-tokens.npy")
    again = find(storage, job(train), tokenizer)
    assert (again.is_new, again.manifest) == (True, first.manifest)
    assert find(storage, job(train), tokenizer).is_new is False


def test_texts_suites_and_what_was_left_out_are_found_in_an_object_store(
    bucket: Storage, train: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with train.open("a") as file:
        file.write('{"prompt": 1}\n')
    write(tmp_path / "task.jsonl", "Two\u2028AA.", "None.")
    spec = job(train, preparation={"maxRejectedFraction": 0.5}, suites=[suite(tmp_path / "task.jsonl")])
    for uid in ("u1", "u2"):
        entry = find(bucket, of(spec, uid=uid), tokenizer)
        assert rejects(bucket, uid) == [4]
    assert [case.reference for case in read_cases(bucket.location(entry.name), "suite-task")] == ["Two\u2028AA.", "None."]
    assert len(read_cases(bucket.location(entry.name), "validation")) == 1
    assert len(open_prepared(bucket.location(entry.name), tmp_path / "cache").suites["task"]) == 2
