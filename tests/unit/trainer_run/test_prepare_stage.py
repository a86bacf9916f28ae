"""The head's first stage with the quickstart's model: where the prepared data is, and who finds it there."""

import shutil
from pathlib import Path

import pytest

from finetune_api.v1alpha1 import parse_job
from finetune_trainer import data_cache
from finetune_trainer.attempt import Attempt, Preparation
from finetune_trainer.console import Console
from finetune_trainer.crew import Crew
from finetune_trainer.data.examples import open_prepared
from finetune_trainer.environment import Environment
from finetune_trainer.errors import JobError
from finetune_trainer.following import Following
from finetune_trainer.interruption import Interruption
from finetune_trainer.preparing import PREPARED_FACTS, prepare
from finetune_trainer.report import Reporter

EXAMPLES = Path(__file__).parents[3] / "examples"


def head_prepares(attempt: Attempt) -> Preparation:
    """The stage by itself, with no worker at hand."""
    with Crew(attempt) as crew:
        return prepare(attempt, crew)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return Path(shutil.copy(EXAMPLES / "data" / "support" / "test.jsonl", tmp_path / "train.jsonl"))


def attempt(data: Path, uid: str = "u1", number: int = 1, strategy: str = "auto", **training: object) -> Attempt:
    spec = {
        "model": {"source": f"file://{EXAMPLES}/models/tiny-llama"},
        "data": {"train": {"source": f"file://{data}"}},
        "method": {"lora": {}},
        "training": {"maxSequenceLength": 256} | training,
        "compute": {"strategy": strategy},
        "output": {"storage": f"file://{data.parent}/out"},
    }
    metadata = {"name": "bot", "namespace": "team", "uid": uid}
    job = parse_job({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": spec}, local=True)
    job_file = data.parent / "job.json"
    job_file.write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    environment = Environment(job_file, number, data, "127.0.0.1", 6379, 8000, data.parent, local=True)
    reporter, console, interruption = Reporter(uid, number), Console(), Interruption()
    return Attempt(environment, job, reporter, console, None, Following(reporter, console, interruption), interruption)  # type: ignore[arg-type]


def refuse(*_: object) -> None:
    pytest.fail("the data was prepared again")


def test_the_workers_are_told_where_the_data_is(data: Path, tmp_path: Path) -> None:
    first = attempt(data)
    preparation = head_prepares(first)
    prepared = open_prepared(first.storage.location(preparation.data), tmp_path / "cache")
    assert prepared.digest == preparation.resolved.data_digest == preparation.config["data"]["digest"]
    summary = first.reporter.report.data
    assert summary is not None
    assert (summary.train, summary.validation) == (prepared.train.groups, prepared.validation.groups)
    assert summary.tokens == len(prepared.train.tokens)


def test_another_job_with_the_same_data_finds_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = head_prepares(attempt(data, "u1"))
    monkeypatch.setattr(data_cache, "write_data", refuse)
    second = head_prepares(attempt(data, "u2", epochs=5))
    assert (second.data, second.resolved.data_digest) == (first.data, first.resolved.data_digest)
    assert second.resolved.config_digest != first.resolved.config_digest


def test_a_later_attempt_takes_the_same_whatever_has_become_of_the_source(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = head_prepares(attempt(data))
    data.unlink()
    monkeypatch.setattr(data_cache, "find_or_prepare", refuse)
    assert head_prepares(attempt(data, number=2)).data == first.data


def test_a_later_attempt_whose_folder_was_removed_prepares_again(data: Path) -> None:
    first = attempt(data)
    before = head_prepares(first)
    shutil.rmtree(first.storage.location(before.data).path)
    again = head_prepares(attempt(data, number=2))
    assert (again.data, again.resolved) == (before.data, before.resolved)
    assert open_prepared(first.storage.location(again.data), data.parent).digest == before.resolved.data_digest


def test_a_later_attempt_does_not_take_a_folder_with_something_else(data: Path) -> None:
    first = attempt(data)
    before = head_prepares(first)
    manifest = Path(first.storage.location(before.data).path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace(before.resolved.data_digest, "sha256:" + "0" * 64))
    facts = first.own.read_json(PREPARED_FACTS)
    assert facts is not None
    assert not data_cache.is_there(first.storage, before.data, facts["digest"])
    assert head_prepares(attempt(data, number=2)).resolved.data_digest != before.resolved.data_digest


def test_bad_data_leaves_no_facts(data: Path) -> None:
    data.write_text('{"messages": []}\n')
    refused = attempt(data)
    with pytest.raises(JobError, match="messages is empty"):
        head_prepares(refused)
    assert refused.own.read_json(PREPARED_FACTS) is None


def test_what_has_no_effect_is_told_before_workers_are_asked_for(data: Path) -> None:
    plain, sharded = attempt(data), attempt(data, "u2", strategy="fsdp")
    head_prepares(plain)
    head_prepares(sharded)
    (few,) = plain.reporter.report.warnings
    assert few.startswith("method.lora trains on ")
    same, warning = sharded.reporter.report.warnings
    assert same == few
    assert warning.startswith("compute.strategy fsdp is without effect")
