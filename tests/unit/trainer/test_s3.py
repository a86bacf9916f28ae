"""s3:// by pyarrow's client against an S3 of the tests' own."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tenacity
import torch
from fake_s3 import FakeS3
from pyarrow import parquet
from tiny_models import job_manifest
from transformers import PreTrainedTokenizerFast

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import DataSource, ModelSource, Output, SecretReference, parse_job
from finetune_trainer import data_cache, sources
from finetune_trainer.data.examples import join, open_prepared
from finetune_trainer.data.inputs import Files
from finetune_trainer.data.rows import Row, read_rows
from finetune_trainer.data.writing import SplitWriter, digest_of, write_manifest
from finetune_trainer.errors import JobError
from finetune_trainer.model_files import fetch_below, fetch_model
from finetune_trainer.objectives.distillation import teacher_cache
from finetune_trainer.objectives.distillation.soft_targets import hard_targets
from finetune_trainer.sources import Mounts, files_under, resolve_data, resolve_storage
from finetune_trainer.storage import MANIFEST, storage_at

SECRET = SecretReference(name="s3")
CPU = torch.device("cpu")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    server = FakeS3()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(sources, "RETRY_WAIT", tenacity.wait_none())
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def mounts(tmp_path: Path, s3: FakeS3) -> Mounts:
    folder = tmp_path / "secrets" / "s3"
    folder.mkdir(parents=True)
    for key, value in {"accessKeyId": "id", "secretAccessKey": "hidden", "endpoint": s3.endpoint}.items():
        (folder / key).write_text(value)
    return Mounts(tmp_path)


def rows(uri: str, mounts: Mounts) -> list[object]:
    found = read_rows(resolve_data(DataSource(source=uri, secret_ref=SECRET), mounts))
    return [row.columns["text"] if isinstance(row, Row) else str(row) for row in found]


def test_a_file(s3: FakeS3, mounts: Mounts) -> None:
    s3.objects["sets/train.jsonl"] = b'{"text": "a"}\n{"text": "b"}\n{'
    problem = "the row is not JSON: Expecting property name enclosed in double quotes at column 2"
    assert rows("s3://bucket/sets/train.jsonl", mounts) == ["a", "b", f"s3://bucket/sets/train.jsonl, line 3: {problem}"]


def test_a_folder(s3: FakeS3, mounts: Mounts) -> None:
    s3.objects |= {"sets/b.jsonl": b'{"text": "b"}', "sets/a/c.jsonl": b'{"text": "c"}', "sets/_SUCCESS": b"", "other.jsonl": b"{}"}
    assert rows("s3://bucket/sets", mounts) == ["c", "b"]


def test_parquet_is_read_from_its_end(s3: FakeS3, mounts: Mounts) -> None:
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"text": ["a", "b"]}), buffer)
    s3.objects["sets/train.parquet"] = buffer.getvalue()
    assert rows("s3://bucket/sets/train.parquet", mounts) == ["a", "b"]


def test_what_is_not_there(s3: FakeS3, mounts: Mounts) -> None:
    for uri in ("s3://bucket/no.jsonl", "s3://other/no.jsonl"):
        with pytest.raises(JobError, match=f"{uri} does not exist") as caught:
            rows(uri, mounts)
        assert caught.value.reason == Reason.DATASET_NOT_FOUND


def test_keys_that_are_not_accepted(s3: FakeS3, mounts: Mounts) -> None:
    (mounts.root / "secrets" / "s3" / "accessKeyId").write_text("stranger")
    with pytest.raises(JobError) as caught:
        rows("s3://bucket/no.jsonl", mounts)
    assert caught.value.reason == Reason.AUTHENTICATION_FAILED
    assert "hidden" not in caught.value.message


def test_prepared_data(s3: FakeS3, mounts: Mounts, tmp_path: Path) -> None:
    """The head puts it into the storage whole, the workers copy it; what another makes meanwhile is not taken."""
    storage = storage_at(resolve_storage(Output(storage="s3://bucket/out", secret_ref=SECRET), mounts))
    for number in (5, 9):
        with storage.shared_folder("cache/a") as folder:
            with SplitWriter(folder, "train") as writer:
                writer.add(np.arange(number, dtype=np.int32), np.ones(number, np.bool_))
            with SplitWriter(folder, "validation") as writer:
                writer.add(np.arange(3, dtype=np.int32), np.ones(3, np.bool_))
            write_manifest(folder, ["train", "validation"], 1, {"rejected": 0})
    read = open_prepared(storage.location("cache/a"), tmp_path / "cache")
    assert read.train.tokens.tolist() == [0, 1, 2, 3, 4]
    assert digest_of(tmp_path / "cache" / read.digest.replace(":", "-"), ["train", "validation"], 1) == read.digest
    assert files_under(storage.location("cache/a"))[0].uri == "s3://bucket/out/cache/a/manifest.json"


def test_data_that_is_prepared_once(s3: FakeS3, mounts: Mounts, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Source and storage are in the object store; a file of the prepared folder that is lost is made again."""
    s3.objects["sets/train.jsonl"] = b'{"text": "a b c"}\n{"text": "d e f"}\n'
    secret = {"name": "s3"}
    data = {"train": {"source": "s3://bucket/sets/train.jsonl", "secretRef": secret}}
    job = parse_job(job_manifest(data=data, output={"storage": "s3://bucket/out", "secretRef": secret}), local=True)
    storage = storage_at(resolve_storage(job.spec.output, mounts))
    first, second = (data_cache.find_or_prepare(storage, job, mounts, tokenizer) for _ in range(2))
    assert (first.is_new, second.is_new, first.manifest) == (True, False, second.manifest)
    assert data_cache.is_there(storage, first.name, first.manifest["digest"])
    data_cache.mark_used(storage, first.name)
    assert "used" in storage.read_json(f"{first.name}.json")
    prepared = open_prepared(storage.location(first.name), tmp_path / "cache")
    assert {tokenizer.decode(part.example(0)[0].tolist()) for part in (prepared.train, prepared.validation)} == {"a b c<eos>", "d e f<eos>"}
    del s3.objects[f"out/{first.name}/train-tokens.npy"]
    assert not data_cache.is_there(storage, first.name, first.manifest["digest"])
    assert data_cache.find_or_prepare(storage, job, mounts, tokenizer).is_new


def test_what_a_file_holds_is_its_identity(s3: FakeS3, mounts: Mounts) -> None:
    def identity(key: str) -> list[str]:
        return Files(resolve_data(DataSource(source=f"s3://bucket/{key}", secret_ref=SECRET), mounts)).identity()

    s3.objects |= {"a.jsonl": b'{"text": "a"}', "b.jsonl": b'{"text": "a"}', "c.jsonl": b'{"text": "c"}'}
    assert identity("a.jsonl") == identity("b.jsonl") != identity("c.jsonl")


def test_a_model(s3: FakeS3, mounts: Mounts, tmp_path: Path, model_folder: Path) -> None:
    s3.objects |= {f"models/tiny/{path.name}": path.read_bytes() for path in model_folder.iterdir()}
    s3.objects["models/tiny/runs/pytorch_model.bin"] = b"pickle"
    source = ModelSource(source="s3://bucket/models/tiny", secret_ref=SECRET)
    head = fetch_model(source, mounts, tmp_path / "head", weights=False)
    assert head.weights == ("model.safetensors",)
    assert not (head.folder / "model.safetensors").exists()
    worker = fetch_model(source, mounts, tmp_path / "worker", weights=True, revision=head.revision)
    assert worker.revision == head.revision
    assert (worker.folder / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    assert not list(worker.folder.glob(".*.part"))
    s3.objects["models/tiny/1_Pooling/config.json"] = b"{}"
    below = fetch_below(source, mounts, tmp_path / "worker", worker, "1_Pooling/config.json")
    assert below == worker.folder / "1_Pooling" / "config.json"
    assert below.read_bytes() == b"{}"
    with pytest.raises(JobError, match=r"s3://bucket/models/tiny/2_Dense/config\.json does not exist") as caught:
        fetch_below(source, mounts, tmp_path / "worker", worker, "2_Dense/config.json")
    assert caught.value.reason == Reason.MODEL_INVALID


def test_the_output_storage(s3: FakeS3, mounts: Mounts, tmp_path: Path) -> None:
    """What checkpoints and publishing do: a folder is there with its manifest, and only with it."""
    storage = storage_at(resolve_storage(Output(storage="s3://bucket/out", secret_ref=SECRET), mounts))
    storage.check_writable()
    storage.write_json("report.json", {"a": 1})
    assert storage.read_json("report.json") == {"a": 1}
    assert storage.read_json("other.json") is None
    for text in ("first", "second"):
        with storage.new_folder("checkpoints/step-1") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "state.safetensors").write_text(text)
            (folder / MANIFEST).write_text("{}")
    assert storage.folders("checkpoints") == ["step-1"]
    with storage.folder("checkpoints/step-1") as copy:
        assert (copy / "sub" / "state.safetensors").read_text() == "second"
    storage.set_aside("checkpoints/step-1", "checkpoints/damaged-1")
    assert not storage.exists(f"checkpoints/step-1/{MANIFEST}")
    storage.remove("checkpoints/step-1")
    assert storage.folders("checkpoints") == []
    assert {key for key in s3.objects if not key.endswith("/")} == {"out/report.json"}


def test_what_a_teacher_said_in_a_bucket(s3: FakeS3, mounts: Mounts) -> None:
    """Found whole with one listing, found damaged when an object is gone; and told with the place where it cannot be read."""
    storage = storage_at(resolve_storage(Output(storage="s3://bucket/teacher", secret_ref=SECRET), mounts))
    data = join([(np.arange(size, dtype=np.int32), np.ones(size, np.bool_)) for size in (4, 3)])
    assert not teacher_cache.is_complete(storage)
    shards = teacher_cache.shards_of(data)
    for number, (start, end) in enumerate(shards):
        tokens = np.concatenate([data.example(index)[0][1:] for index in range(start, end)])
        teacher_cache.write_shard(storage, number, hard_targets(tokens, 2))
    teacher_cache.write_complete(storage, shards)
    assert teacher_cache.is_complete(storage)
    assert teacher_cache.TeacherCache(storage, data).of((1,), CPU).ids[:, 0].tolist() == [1, 2]
    gone = s3.objects.pop("teacher/shard-00001/ids.npy")
    assert not teacher_cache.is_complete(storage)
    with pytest.raises(JobError, match=r"s3://bucket/teacher: what the teacher said cannot be read: .*shard-00001") as caught:
        teacher_cache.TeacherCache(storage, data)
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE
    s3.objects["teacher/shard-00001/ids.npy"] = gone
    assert teacher_cache.is_complete(storage)
