"""Code that lies beside a model's weights: it runs where the job (and with it the profile) says so, and nowhere else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from tests.unit.trainer.tiny_models import job_manifest

from finetune_api.sources import ModelSource
from finetune_api.v1alpha1 import parse_job
from finetune_trainer.attention import forward_arguments, probe
from finetune_trainer.errors import JobError
from finetune_trainer.model import inspect_model, load_model, load_tokenizer, read_config
from finetune_trainer.model_files import CODE as PYTHON
from finetune_trainer.model_files import OTHERS, ModelFiles, _copied, fetch_model
from finetune_trainer.sources import Location, Mounts

CODE = """
import os
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path(os.environ["REMOTE_CODE_RAN"]).touch()


class OwnConfig(LlamaConfig):
    model_type = "own-model-of-a-test"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *given, **named):
        self.config.forwards = getattr(self.config, "forwards", 0) + 1
        return super().forward(*given, **named)
"""
MAP = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the model's code makes when it is run."""
    mark = tmp_path / "the-code-ran"
    monkeypatch.setenv("REMOTE_CODE_RAN", str(mark))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return mark


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, ran: Path) -> Path:
    """The tiny model as one that transformers does not know, with its code beside it."""
    made = Path(shutil.copytree(model_folder, tmp_path / "claims" / "models" / "own"))
    (made / "own_model.py").write_text(CODE)
    config = json.loads((made / "config.json").read_text())
    config |= {"model_type": "own-model-of-a-test", "architectures": ["OwnModel"], "auto_map": MAP}
    (made / "config.json").write_text(json.dumps(config))
    return made


def fetched(tmp_path: Path, *, trust: bool, revision: str | None = None) -> ModelFiles:
    source = ModelSource(source="pvc://models/own", trust_remote_code=trust)
    return fetch_model(source, Mounts(tmp_path), tmp_path / "cache", weights=True, revision=revision)


@pytest.mark.usefixtures("folder")
def test_without_trust_the_model_is_refused_and_its_code_does_not_run(tmp_path: Path, ran: Path) -> None:
    files = fetched(tmp_path, trust=False)
    assert not files.trusted
    with pytest.raises(JobError, match="has no configuration that transformers knows"):
        read_config(files)
    load_tokenizer(files)
    assert not ran.exists()


@pytest.mark.usefixtures("folder")
def test_with_trust_the_models_own_class_is_inspected_loaded_and_trained(tmp_path: Path, ran: Path) -> None:
    files = fetched(tmp_path, trust=True)
    job = parse_job(job_manifest(model={"source": "pvc://models/own", "trustRemoteCode": True}), local=True)
    assert inspect_model(files, job).tokenizer.is_fast
    model = load_model(files, job, torch.device("cpu"))
    assert ran.exists()
    assert type(model.transformer).__name__ == "OwnModel"
    model.module(**forward_arguments(probe([[3, 4, 5, 6]], model.layout))).logits.square().sum().backward()
    assert model.transformer.config.forwards > 0
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.module.parameters())


def test_code_that_changes_between_attempts_is_refused(tmp_path: Path, folder: Path) -> None:
    first = fetched(tmp_path, trust=True).revision
    assert fetched(tmp_path, trust=True, revision=first).revision == first
    (folder / "own_model.py").write_text(CODE + "\n# other code\n")
    with pytest.raises(JobError, match="have changed since the job began"):
        fetched(tmp_path, trust=True, revision=first)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused(tmp_path: Path, folder: Path, ran: Path, name: str) -> None:
    path = folder / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"auto_map": {"AutoModelForCausalLM": "someone/else--own_model.OwnModel"}}))
    with pytest.raises(JobError, match=f"auto_map of {name} names code of another repository"):
        fetched(tmp_path, trust=True)
    assert not ran.exists()


def test_without_trust_code_is_not_even_copied(tmp_path: Path, folder: Path) -> None:
    """From an object store; a folder on a volume is used where it is."""
    place = Location(LocalFileSystem(), str(folder), "s3://bucket/own")
    plain = _copied(place, tuple(path.name for path in folder.iterdir()), tmp_path / "plain", OTHERS)
    trusted = _copied(place, tuple(path.name for path in folder.iterdir()), tmp_path / "trusted", (*OTHERS, *PYTHON))
    assert sorted(path.suffix for path in plain.iterdir() if path.suffix == ".py") == []
    assert [path.name for path in trusted.iterdir() if path.suffix == ".py"] == ["own_model.py"]
