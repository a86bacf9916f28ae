"""Publishing: what stands in the folder, whose it is, and that doing it twice changes nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from finetune_api.reasons import Reason
from finetune_api.status import ArtifactKind, ModelSummary, Resolved
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation import compare
from finetune_trainer.export import check_free, publish
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.model_card import Publication, model_card
from finetune_trainer.result import Result, read_result, write_result
from finetune_trainer.storage import Storage

CONFIG = {"data": {"digest": "sha256:d"}}
COUNTS = ModelSummary(parameters=400_000, trained_parameters=1_000)
RESOLVED = Resolved(model_revision="c0ffee", data_digest="sha256:d", config_digest="sha256:c")


class Tokenizer:
    """Stands for a transformers tokenizer: all that publishing asks of one."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def job(
    name: str = "bot",
    uid: str = "u1",
    method: dict[str, Any] | None = None,
    artifacts: tuple[ArtifactKind, ...] | None = None,
    objective: dict[str, Any] | None = None,
) -> FineTuneJob:
    spec = {
        "model": {"source": "hf://owner/base"},
        "data": {"train": {"source": "pvc://data/train.jsonl"}},
        "method": method or {"lora": {"rank": 8}},
        "objective": objective or {"sft": {}},
        "output": {"storage": "pvc://models/bot"} | ({"artifacts": list(artifacts)} if artifacts else {}),
    }
    metadata = {"name": name, "namespace": "team", "uid": uid}
    return parse_job({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": spec})


def publication(own: Storage, **of_job: Any) -> Publication:
    """A publication whose result the workers have left."""

    def export(folder: Path, kind: ArtifactKind) -> None:
        (folder / "adapter_model.safetensors").write_bytes(kind.encode())
        (folder / "README.md").write_text("peft's own card")

    before, after = {"validation": 2.0, "test": 3.0}, {"validation": 1.0, "test": 1.5}
    kinds = job(**of_job).spec.artifacts
    write_result(own, Result(steps=10, trained_tokens=1000, before=before, after=after, config=CONFIG, kinds=kinds), export)
    left = read_result(own, CONFIG)
    assert left is not None
    base = BaseModel("owner/base", "c0ffee", "bfloat16")
    return Publication(job(**of_job), base, Tokenizer(), left, RESOLVED, compare(left.before, left.after), COUNTS)  # type: ignore[arg-type]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(LocalFileSystem(), str(tmp_path / "out"), "pvc://models/bot")


def test_the_folder_holds_weights_tokenizer_card_and_evidence(storage: Storage, tmp_path: Path) -> None:
    (artifact,) = publish(publication(storage.at("own")), storage, storage.at("own"))
    folder = tmp_path / "out" / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_model.safetensors", "manifest.json", "tokenizer.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["job"] == {"namespace": "team", "name": "bot", "uid": "u1"}
    assert manifest["resolved"]["dataDigest"] == "sha256:d"
    assert (artifact.kind, artifact.uri) == ("adapter", "pvc://models/bot/adapter")
    assert artifact.bytes == sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    assert read_result(storage.at("own"), CONFIG) is not None, "what the workers left must stay whole until the job is done"


def test_publishing_again_changes_nothing(storage: Storage, tmp_path: Path) -> None:
    own = storage.at("own")
    first = publish(publication(own), storage, own)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "adapter").iterdir()}
    assert publish(publication(own), storage, own) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "adapter").iterdir()} == before


def test_a_later_job_of_the_same_name_replaces_its_own(storage: Storage) -> None:
    own = storage.at("own")
    publish(publication(own), storage, own)
    check_free(storage, job(uid="u2"), storage.at("own"))
    publish(publication(own, uid="u2"), storage, own)
    assert storage.read_json("adapter/manifest.json")["job"]["uid"] == "u2"  # type: ignore[index]


def test_another_jobs_result_is_not_overwritten(storage: Storage) -> None:
    publish(publication(storage.at("own")), storage, storage.at("own"))
    with pytest.raises(JobError, match="the result of the job team/bot") as caught:
        check_free(storage, job(name="other"), storage.at("own"))
    assert caught.value.reason == Reason.INVALID_SPEC
    check_free(storage, job(name="other", method={"full": {}}), storage.at("own"))


def test_files_of_people_are_not_overwritten(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    with pytest.raises(JobError, match="files that no job published"):
        check_free(storage, job(), storage.at("own"))


def test_a_result_of_another_configuration_or_not_whole_is_none(storage: Storage, tmp_path: Path) -> None:
    own = storage.at("own")
    publication(own)
    assert read_result(own, {"data": {"digest": "sha256:other"}}) is None
    (tmp_path / "out" / "own" / "result" / "adapter" / "adapter_model.safetensors").write_bytes(b"adapted")
    assert read_result(own, CONFIG) is None


@pytest.mark.parametrize(("kind", "relation"), [("adapter", "adapter"), ("merged", "merge"), ("model", "finetune")])
def test_the_card_is_what_the_hub_reads(storage: Storage, kind: ArtifactKind, relation: str) -> None:
    given = publication(storage.at("own"), method={"full": {}} if kind == "model" else {"lora": {"rank": 8}})
    card = model_card(given, kind)
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["base_model"] == "owner/base"
    assert metadata["base_model_relation"] == relation
    assert metadata["library_name"] == ("peft" if kind == "adapter" else "transformers")
    measures = {measure["name"]: measure["value"] for measure in metadata["model-index"][0]["results"][0]["metrics"]}
    # The perplexity is e to the power of the loss.
    assert measures == {"validation/loss": 1.0, "validation/perplexity": 2.718282, "test/loss": 1.5, "test/perplexity": 4.481689}
    assert "| test/loss | 3.0000 | 1.5000 |" in body
    assert "revision='c0ffee'" in body if kind == "adapter" else "AutoModelForCausalLM" in body
    assert "| Trained parameters | 1,000 of 400,000 (0.25%) |" in body
    assert "| Data digest | `sha256:d` |" in body
    snippet = body.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")


def test_a_loss_too_large_for_a_perplexity_has_none() -> None:
    results = {result.metric: result for result in compare({"validation": 1e6}, {"validation": 0.0}).results}
    assert results["validation/perplexity"].baseline is None
    assert results["validation/perplexity"].value == 1.0


def test_the_card_tells_to_load_only_what_can_be_loaded(storage: Storage) -> None:
    ready = publication(storage.at("own"))
    card = model_card(replace(ready, base=BaseModel("pvc://models/base")), "adapter")
    assert 'from_pretrained("path/to/the/base/model")  # pvc://models/base' in card


def test_what_another_job_published_in_the_meantime_is_not_overwritten(storage: Storage) -> None:
    ready = publication(storage.at("own"), name="other", uid="u2")
    publish(publication(storage.at("first")), storage, storage.at("first"))
    with pytest.raises(JobError, match="holds the result of the job team/bot") as caught:
        publish(ready, storage, storage.at("own"))
    assert caught.value.reason == Reason.INVALID_SPEC


def test_an_upload_that_was_killed_is_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def killed(source: str, target: str) -> None:
        upload(source, target)
        raise KilledError

    MemoryFileSystem.store.clear()
    storage = Storage(MemoryFileSystem(), "/bucket/out", "s3://bucket/out")
    own = storage.at("own")
    ready, upload = publication(own), storage.fs.put_file
    with monkeypatch.context() as patch:
        patch.setattr(storage.fs, "put_file", killed)
        with pytest.raises(KilledError):
            publish(ready, storage, own)
    assert storage.exists("adapter")
    check_free(storage, ready.job, own)
    assert [artifact.kind for artifact in publish(ready, storage, own)] == ["adapter"]
    with pytest.raises(JobError, match="team/bot"):
        check_free(storage, job("other", "u2"), storage.at("another"))


def test_each_kind_has_its_place_and_evidence(storage: Storage, tmp_path: Path) -> None:
    own = storage.at("own")
    artifacts = publish(publication(own, artifacts=("adapter", "merged")), storage, own)
    assert [(artifact.kind, artifact.uri) for artifact in artifacts] == [
        ("adapter", "pvc://models/bot/adapter"),
        ("merged", "pvc://models/bot/merged"),
    ]
    for kind in ("adapter", "merged"):
        assert (tmp_path / "out" / kind / "adapter_model.safetensors").read_text() == kind
        assert json.loads((tmp_path / "out" / kind / "manifest.json").read_text())["kind"] == kind
        assert (tmp_path / "out" / kind / "tokenizer.json").exists()
    assert artifacts[0].digest != artifacts[1].digest


def test_a_place_that_is_taken_keeps_every_kind_back(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "out" / "merged").mkdir(parents=True)
    own = storage.at("own")
    with pytest.raises(JobError, match="bot/merged holds files"):
        publish(publication(own, artifacts=("adapter", "merged")), storage, own)
    assert not (tmp_path / "out" / "adapter").exists()


def test_what_was_left_of_several_kinds_is_published_when_it_is_tried_again(storage: Storage, tmp_path: Path) -> None:
    own = storage.at("own")
    ready = publication(own, artifacts=("adapter", "merged"))
    first = publish(ready, storage, own)
    (tmp_path / "out" / "merged" / "manifest.json").unlink()
    before = (tmp_path / "out" / "adapter" / "manifest.json").stat().st_mtime_ns
    assert publish(ready, storage, own) == first
    assert (tmp_path / "out" / "adapter" / "manifest.json").stat().st_mtime_ns == before


def test_merged_is_made_last(storage: Storage) -> None:
    """Working an adapter into the weights is the end of the model in memory."""
    made: list[str] = []
    result = Result(1, 1, {}, {}, CONFIG, kinds=("merged", "adapter"))
    write_result(storage, result, lambda folder, kind: made.append(kind))
    assert made == ["adapter", "merged"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"lora": {"rank": 8}}, "LoRA, rank 8, alpha 32, dropout 0, targetModules all-linear, variant none"),
        ({"freeze": {"lastLayers": 2}}, "fine-tuning of a part of the weights, lastLayers 2, embeddings false, head false"),
        ({"ia3": {}}, "(IA)^3"),
        ({"adapter": {}}, "bottleneck adapter, reductionFactor 16, nonLinearity relu, placement pfeiffer, dropout 0"),
        ({"promptTuning": {"initText": "a | b"}}, r"prompt tuning, numVirtualTokens 20, initText a \| b"),
    ],
)
def test_the_card_tells_the_method_with_its_parameters(storage: Storage, method: dict[str, Any], said: str) -> None:
    given = publication(storage.at("own"), method=method)
    card = model_card(given, given.job.spec.artifacts[0])
    assert f"| Method | {said}" in card
    assert ("import bottleneck_adapter" in card) == ("adapter" in method)


RESOLVED_TEACHER = {"teacher": {"source": "hf://owner/large", "revision": "5eed"}}
SERVED = {"url": "https://models.example.com:8443/inner/v1", "model": "large | 2", "secretRef": {"name": "key-of-models"}}


@pytest.mark.parametrize(
    ("teacher", "config", "said"),
    [
        ({"source": "hf://owner/large", "revision": "main"}, RESOLVED_TEACHER, "`hf://owner/large` at `5eed`"),
        ({"source": "pvc://models/large"}, {}, "`pvc://models/large`"),
        ({"source": "s3://models/large", "secretRef": {"name": "key-of-models"}}, {}, "`s3://models/large`"),
        ({"endpoint": SERVED}, {}, r"`large \| 2`, served by models.example.com"),
    ],
)
def test_the_card_names_the_teacher(storage: Storage, teacher: dict[str, Any], config: dict[str, Any], said: str) -> None:
    """And no key, nor more of an address than whose it is."""
    given = publication(storage.at("own"), objective={"distillation": {"teacher": teacher, "response": {}}})
    card = model_card(replace(given, result=replace(given.result, config=CONFIG | config)), "adapter")
    assert f"| Teacher | {said} |\n" in card
    assert "key-of-models" not in card
    assert "inner" not in card
    assert "| Objective | distillation |" in card


def test_the_card_of_a_model_without_a_teacher_names_none(storage: Storage) -> None:
    assert "Teacher" not in model_card(publication(storage.at("own")), "adapter")
