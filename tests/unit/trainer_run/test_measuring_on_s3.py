"""A model that was published to an object store is measured again from there, on fresh data that lies there too."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity
from tests.in_process import run_job
from tests.tiny_llama import make_tiny_llama, write_questions
from tests.unit.trainer.fake_s3 import FakeS3
from tests.unit.trainer_run.test_measuring_runs import FRESH, a_job, questions

from finetune_api.reasons import Reason
from finetune_trainer import sources
from finetune_trainer.errors import JobError

SECRET = {"secretRef": {"name": "s3"}}
OUTPUT = {"storage": "s3://bucket/out", **SECRET}
MONITORING = {**FRESH, "suites": [{"name": "task", "source": "s3://bucket/fresh/", **SECRET}]}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    make_tiny_llama(folder / "claims" / "data" / "model")
    write_questions(folder / "claims" / "data" / "train.jsonl", 48)
    write_questions(folder / "claims" / "data" / "validation.jsonl", 12, start=100)
    return folder


@pytest.fixture
def s3(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    server = FakeS3()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(sources, "RETRY_WAIT", tenacity.wait_none())
    secret = volumes / "secrets" / "s3"
    secret.mkdir(parents=True, exist_ok=True)
    for key, value in {"accessKeyId": "id", "secretAccessKey": "hidden", "endpoint": server.endpoint}.items():
        (secret / key).write_text(value)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def put_fresh(s3: FakeS3, name: str, numbers: range) -> None:
    s3.objects[f"fresh/{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in questions(numbers)).encode()


@pytest.mark.parametrize("method", [{"lora": {}}, {"full": {}}], ids=["adapter", "model"])
def test_what_was_published_to_an_object_store_is_measured_from_there(
    method: dict[str, Any], volumes: Path, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"s3-{next(iter(method))}"
    report = run_job(a_job(name, method, output=OUTPUT), volumes, monkeypatch).report
    assert report.evaluation is not None
    released = {result.metric: result.value for result in report.evaluation.results}
    for key in [key for key in s3.objects if "/checkpoints/" in key and key.endswith(".safetensors")]:
        del s3.objects[key]  # the artifact, not what the training has left
    before = dict(s3.objects)
    put_fresh(s3, "one", range(100, 106))
    put_fresh(s3, "two", range(106, 112))
    s3.failures = 3
    fresh = run_job(a_job(name, method, output=OUTPUT, monitoring=MONITORING), volumes, monkeypatch, attempt=2).report.fresh
    assert {each.metric: each.n for each in fresh} == {"task/loss": 12, "task/exactMatch": 12}
    for each in fresh:
        assert each.value == pytest.approx(released[each.metric], rel=1e-5)  # the very examples of the release
    own = f"out/.finetune/{name}/monitoring/"
    assert {key: s3.objects[key] for key in s3.objects if not key.startswith(("fresh/", own))} == before
    assert any(key.startswith(f"{own}answers/published/task") for key in s3.objects)


def test_an_artifact_that_is_gone_from_the_object_store_is_told_of(volumes: Path, s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    method = {"lora": {}}
    run_job(a_job("s3-gone", method, output=OUTPUT), volumes, monkeypatch)
    put_fresh(s3, "one", range(4))
    del s3.objects["out/adapter/manifest.json"]
    with pytest.raises(JobError, match=r"s3://bucket/out/adapter no longer holds what this job has published") as caught:
        run_job(a_job("s3-gone", method, output=OUTPUT, monitoring=MONITORING), volumes, monkeypatch, attempt=2)
    assert caught.value.reason == Reason.MODEL_NOT_FOUND
