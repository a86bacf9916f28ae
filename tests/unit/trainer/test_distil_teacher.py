"""A teacher that is a model: what the head finds wrong with it, and when a worker loads it."""

import errno
import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from tests.tiny_llama import make_tiny_llama
from tiny_models import job_manifest

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer import model_files
from finetune_trainer.activations import with_activations
from finetune_trainer.errors import JobError
from finetune_trainer.failures import failure_from
from finetune_trainer.model import load_model, load_tokenizer
from finetune_trainer.model_files import fetch_model
from finetune_trainer.objectives.distillation.teacher_cache import write_complete
from finetune_trainer.sources import Location, Mounts, files_under
from finetune_trainer.storage import Storage
from finetune_trainer.teacher import BESIDE_DATA, CACHE, CheckedTeacher, Place, Taught, check_teacher, shortest_limit, taught
from finetune_trainer.worker import Worker

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher of three layers, and one with another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_llama(folder / "student", width=16)
    make_tiny_llama(folder / "teacher", width=32, layers=3, seed=1)
    make_tiny_llama(folder / "other", seed=2)
    text = (folder / "other" / "tokenizer.json").read_text()
    (folder / "other" / "tokenizer.json").write_text(text.replace('"<unk>"', '"<unknown>"'))
    settings = (folder / "other" / "tokenizer_config.json").read_text()
    (folder / "other" / "tokenizer_config.json").write_text(settings.replace('"<unk>"', '"<unknown>"'))
    return folder


def job_of(folder: Path, teacher: str = "teacher", method: dict[str, Any] | None = None, **forms: Any) -> FineTuneJob:
    objective = {"distillation": {"teacher": {"source": f"file://{folder}/{teacher}"}, **(forms or {"response": {}})}}
    given = {"model": {"source": f"file://{folder}/student"}, "objective": objective, "method": method or {"lora": {}}}
    return parse_job(job_manifest(**given), local=True)


def check(folder: Path, tmp_path: Path, revision: str | None = None, **fields: Any) -> CheckedTeacher | None:
    job, mounts = job_of(folder, **fields), Mounts(tmp_path, local=True)
    files = fetch_model(job.spec.model, mounts, tmp_path / "cache", weights=False)
    return check_teacher(job, files, load_tokenizer(files), mounts, tmp_path / "cache", revision)


def test_a_teacher_with_the_students_vocabulary(folder: Path, tmp_path: Path) -> None:
    checked = check(folder, tmp_path)
    assert checked is not None
    assert checked.source == f"file://{folder}/teacher"
    assert checked.revision.startswith("sha256:")
    assert checked.longest == 256
    assert check(folder, tmp_path, revision=checked.revision) == checked


def test_jobs_without_a_teacher_have_none_to_check(folder: Path, tmp_path: Path) -> None:
    job = parse_job(job_manifest(model={"source": f"file://{folder}/student"}), local=True)
    files = fetch_model(job.spec.model, Mounts(tmp_path, local=True), tmp_path, weights=False)
    assert check_teacher(job, files, load_tokenizer(files), Mounts(tmp_path, local=True), tmp_path, None) is None


def test_another_vocabulary_is_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        check(folder, tmp_path, teacher="other")
    assert caught.value.reason == Reason.INVALID_SPEC
    assert "has another vocabulary than" in caught.value.message
    assert "'<unk>'" in caught.value.message
    assert "name it as teacher.endpoint, whose text any student can learn" in caught.value.message


@pytest.mark.parametrize(
    ("damage", "reason", "words"),
    [
        (shutil.rmtree, Reason.MODEL_NOT_FOUND, "does not exist"),
        (lambda model: (model / "config.json").unlink(), Reason.MODEL_INVALID, "has no config.json"),
        (lambda model: (model / "model.safetensors").write_bytes(b"none"), Reason.MODEL_INVALID, "is not a safetensors file"),
        (lambda model: (model / "tokenizer.json").write_text("{"), Reason.MODEL_INVALID, "has no tokenizer that can be loaded"),
        (
            lambda model: (model / "config.json").write_text('{"model_type": "nobody"}'),
            Reason.MODEL_INVALID,
            "has no configuration that transformers knows",
        ),
        (
            lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
            Reason.UNSAFE_MODEL_FORMAT,
            "has no safetensors",
        ),
    ],
)
def test_a_teacher_that_cannot_be_loaded_is_not_waited_for(folder: Path, tmp_path: Path, damage: Any, reason: Reason, words: str) -> None:
    shutil.copytree(folder, tmp_path / "models")
    damage(tmp_path / "models" / "teacher")
    with pytest.raises(JobError) as caught:
        check(tmp_path / "models", tmp_path)
    failure = failure_from(caught.value, "Prepare")
    assert (failure.reason, failure.retryable) == (reason, False)
    assert failure.message.startswith("objective.distillation.teacher: ")
    assert words in failure.message


def test_a_teacher_whose_storage_does_not_answer_is_waited_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unanswered(place: Location) -> tuple[Location, ...]:
        if place.path.endswith("teacher"):
            raise OSError(errno.EIO, "Input/output error")
        return files_under(place)

    monkeypatch.setattr(model_files, "files_under", unanswered)
    with pytest.raises(JobError, match=r"objective\.distillation\.teacher: .* cannot be read: OSError: .*Input/output error") as caught:
        check(folder, tmp_path)
    failure = failure_from(caught.value, "Prepare")
    assert (failure.reason, failure.retryable) == (Reason.TEACHER_UNAVAILABLE, True)


def test_a_teacher_that_has_changed_since_the_job_began(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="have changed since the job began") as caught:
        check(folder, tmp_path, revision="sha256:0")
    assert caught.value.reason == Reason.MODEL_INVALID


@pytest.mark.parametrize(
    ("pair", "attention", "words"),
    [
        ({"student": 3, "teacher": 3}, False, r"layers\[0\]\.student is 3, and the student has the layers 0 \(embeddings\) to 2"),
        ({"student": 1, "teacher": -5}, False, r"layers\[0\]\.teacher is -5, and the teacher has the layers 0 \(embeddings\) to 3"),
        ({"student": 0, "teacher": 1}, True, r"layers\[0\]\.student is the embeddings, which have no attention map"),
        ({"student": 1, "teacher": -4}, True, r"layers\[0\]\.teacher is the embeddings"),
    ],
)
def test_layers_that_are_not_there(folder: Path, tmp_path: Path, pair: dict[str, int], attention: bool, words: str) -> None:
    with pytest.raises(JobError, match=words) as caught:
        check(folder, tmp_path, feature={"layers": [pair], "attention": attention})
    assert caught.value.reason == Reason.INVALID_SPEC


def test_maps_of_a_soft_prompt_are_not_compared(folder: Path, tmp_path: Path) -> None:
    forms = {"feature": {"attention": True}}
    assert check(folder, tmp_path, **forms) is not None
    with pytest.raises(JobError, match="maps of a model with a soft prompt cannot be compared"):
        check(folder, tmp_path, method={"promptTuning": {}}, **forms)


def test_the_longest_example_is_the_one_that_both_take() -> None:
    teacher = CheckedTeacher("hf://a/b", "c", 128)
    assert shortest_limit(256, teacher) == 128
    assert shortest_limit(64, teacher) == 64
    assert shortest_limit(None, teacher) == 128
    assert shortest_limit(64, None) == 64
    assert shortest_limit(None, None) is None


def load(folder: Path, tmp_path: Path, **fields: Any) -> Taught:
    job, mounts = job_of(folder, **fields), Mounts(tmp_path, local=True)
    files = fetch_model(job.spec.model, mounts, tmp_path / "cache", weights=True)
    output = Storage(LocalFileSystem(), str(tmp_path / "out"), f"file://{tmp_path}/out")
    place = Place(output, "data", "sha256:1", mounts, tmp_path / "cache")
    return taught(job, load_model(files, job, CPU), None, place, Worker(), lambda call: call())


def test_the_teacher_is_frozen_and_evaluates(folder: Path, tmp_path: Path) -> None:
    pair = load(folder, tmp_path)
    assert pair.teacher is not None
    assert pair.kept is None
    assert not pair.teacher.module.training
    assert not any(parameter.requires_grad for parameter in pair.teacher.module.parameters())
    assert pair.student.module.training
    assert (pair.student.layout, pair.teacher.layout) == ("flat", "flat")


def test_the_teachers_memory_is_not_the_students(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, of which 8 MiB were free before the teacher was loaded and half of that is left."""
    job, mounts, free = job_of(folder), Mounts(tmp_path, local=True), iter([8 * 2**20, 4 * 2**20])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 2**30))
    files = fetch_model(job.spec.model, mounts, tmp_path / "cache", weights=True)
    student, _ = with_activations(replace(load_model(files, job, CPU), device=torch.device("cuda")), job, Worker())
    place = Place(Storage(LocalFileSystem(), str(tmp_path), "file:///out"), "data", "sha256:1", mounts, tmp_path / "cache")
    pair = taught(job, student, None, place, Worker(), lambda call: call())
    assert pair.teacher is not None
    assert pair.student.auto_tokens is not None
    assert student.auto_tokens is not None
    assert 0 < pair.student.auto_tokens < student.auto_tokens


def test_attention_maps_need_padded_rows_and_plain_attention(folder: Path, tmp_path: Path) -> None:
    pair = load(folder, tmp_path, feature={"attention": True})
    assert pair.teacher is not None
    for model in (pair.student, pair.teacher):
        assert model.layout == "padded"
        assert model.transformer.config._attn_implementation == "eager"


def test_a_teacher_of_whom_all_is_kept_is_neither_fetched_nor_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "models")
    first = load(tmp_path / "models", tmp_path, response={"topK": 4})
    assert first.teacher is not None
    assert first.kept is not None
    assert first.kept.root.startswith(str(tmp_path / "out" / CACHE))
    write_complete(first.kept, [(0, 1)])
    shutil.rmtree(tmp_path / "models" / "teacher")
    second = load(tmp_path / "models", tmp_path, response={"topK": 4})
    assert second.teacher is None
    assert second.kept == first.kept
    with pytest.raises(JobError) as caught:
        load(tmp_path / "models", tmp_path, response={"topK": 4}, relation={})
    assert caught.value.reason == Reason.MODEL_NOT_FOUND


def test_what_an_endpoint_said_stands_beside_the_data(folder: Path, tmp_path: Path) -> None:
    for top, expected in ((0, None), (5, str(tmp_path / "out" / "data" / BESIDE_DATA))):
        endpoint = {"url": "http://127.0.0.1:1/v1", "model": "large", "topLogprobs": top}
        objective = {"distillation": {"teacher": {"endpoint": endpoint}, "response": {}}}
        job = parse_job(job_manifest(model={"source": f"file://{folder}/student"}, objective=objective), local=True)
        files = fetch_model(job.spec.model, Mounts(tmp_path, local=True), tmp_path / "cache", weights=True)
        output = Storage(LocalFileSystem(), str(tmp_path / "out"), "file:///out")
        place = Place(output, "data", "sha256:1", Mounts(tmp_path, local=True), tmp_path / "cache")
        pair = taught(job, load_model(files, job, CPU), None, place, Worker(), lambda call: call())
        assert pair.teacher is None
        assert (pair.kept.root if pair.kept else None) == expected


def kept_in(tmp_path: Path, source: dict[str, Any], revision: str, namespace: str = "team") -> str:
    """The folder of what a teacher says, for one student and one data set."""
    make_tiny_llama(tmp_path / "student", width=16)
    objective = {"distillation": {"teacher": source, "response": {"topK": 4}}}
    job = parse_job(job_manifest(model={"source": f"file://{tmp_path}/student"}, objective=objective), local=True)
    job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": namespace})})
    mounts = Mounts(tmp_path, local=True)
    student = load_model(fetch_model(job.spec.model, mounts, tmp_path / "cache", weights=True), job, CPU)
    output = Storage(LocalFileSystem(), str(tmp_path / "out"), f"file://{tmp_path}/out")
    place = Place(output, "data", "sha256:1", mounts, tmp_path / "cache")
    with pytest.raises(JobError, match="not there"):  # it is missed only after its folder is looked for
        taught(job, student, revision, place, Worker(), _not_there)
    (mark,) = (tmp_path / "out" / CACHE).iterdir()
    return mark.name


def _not_there(call: Any) -> Any:
    raise JobError(Reason.MODEL_NOT_FOUND, "not there")


def test_another_teacher_that_was_made_to_look_the_same_is_another(tmp_path: Path) -> None:
    """What is known of a volume's files leaves out the middle of the large ones: so where they are counts too. A hub's commit says all."""
    seen: dict[str, tuple[dict[str, Any], str, str]] = {
        "a teacher": ({"source": "pvc://models/teacher"}, "sha256:1", "team"),
        "in another claim": ({"source": "pvc://mine/teacher"}, "sha256:1", "team"),
        "in another namespace": ({"source": "pvc://models/teacher"}, "sha256:1", "other"),
        "retrained": ({"source": "pvc://models/teacher"}, "sha256:2", "team"),
        "in a bucket": ({"source": "s3://models/teacher"}, "sha256:1", "team"),
        "behind a server of somebody's": ({"source": "s3://models/teacher", "secretRef": {"name": "mine"}}, "sha256:1", "team"),
        "of the hub": ({"source": "hf://owner/teacher"}, "abc", "team"),
    }
    folders = {what: kept_in(tmp_path / str(number), *fields) for number, (what, fields) in enumerate(seen.items())}
    assert len(set(folders.values())) == len(seen)
    hub = {"source": "hf://owner/teacher", "secretRef": {"name": "token"}}
    assert kept_in(tmp_path / "again", hub, "abc", "other") == folders["of the hub"]


def test_what_no_job_has_begun_with_for_long_goes(folder: Path, tmp_path: Path) -> None:
    """As prepared data does: six bytes for each of topK at each label would else fill the volume in the end."""
    pair = load(folder, tmp_path, response={"topK": 4})
    assert pair.kept is not None
    cache = tmp_path / "out" / CACHE
    for name, when in (("a" * 32, "2020-01-01T00:00:00+00:00"), ("b" * 32, datetime.now(UTC).isoformat())):
        (cache / name).mkdir()
        (cache / f"{name}.json").write_text(json.dumps({"used": when}))
    load(folder, tmp_path, response={"topK": 4})
    assert {path.name for path in cache.iterdir()} == {f"{'b' * 32}", f"{'b' * 32}.json", f"{Path(pair.kept.root).name}.json"}
