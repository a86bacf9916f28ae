"""What the head finds out of method and model without weights, and in which number format workers then keep them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import job_manifest

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel, count_parameters
from finetune_trainer.model import inspect_model, load_model, longest_example
from finetune_trainer.model_files import ModelFiles

CPU = torch.device("cpu")


def job(method: dict[str, object], artifacts: list[str] | None = None, **training: object) -> FineTuneJob:
    output = {"storage": "file:///out"} | ({"artifacts": artifacts} if artifacts else {})
    return parse_job(job_manifest(method=method, output=output, training=training), local=True)


@pytest.mark.parametrize(
    "method",
    [
        {"full": {}},
        {"freeze": {"lastLayers": 1}},
        {"lora": {"rank": 2, "variant": "pissa"}},
        {"adapter": {}},
        {"ia3": {}},
        {"promptTuning": {"initText": "hello"}},
        {"prefixTuning": {}},
        {"pTuning": {}},
    ],
    ids=lambda method: next(iter(method)),
)
def test_what_the_head_counts_is_what_workers_train(model_files: ModelFiles, method: dict[str, object]) -> None:
    counted = inspect_model(model_files, job(method)).summary
    assert counted == count_parameters(load_model(model_files, job(method), CPU).module)
    assert 0 < counted.trained_parameters <= counted.parameters


@pytest.mark.parametrize(("tokens", "room"), [(127, 1), (20, 108)])
def test_a_soft_prompt_takes_room_of_the_context(model_files: ModelFiles, tokens: int, room: int) -> None:
    """The tiny model takes 128 tokens."""
    spec = job({"promptTuning": {"numVirtualTokens": tokens}})
    inspect_model(model_files, spec)
    assert longest_example(model_files, spec.spec.method) == room


@pytest.mark.parametrize("method", ["promptTuning", "prefixTuning", "pTuning"])
def test_more_virtual_tokens_than_context_are_refused(model_files: ModelFiles, method: str) -> None:
    with pytest.raises(JobError, match=f"method.{method}.numVirtualTokens is 128, .* tests/tiny takes 128 tokens in all") as caught:
        inspect_model(model_files, job({method: {"numVirtualTokens": 128}}))
    assert caught.value.reason == Reason.INVALID_SPEC


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path: Path, model_folder: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "tied"))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    files = ModelFiles(folder, BaseModel("tests/tied"), "sha256:0", ("model.safetensors",))
    lora = {"lora": {"targetModules": ["lm_head"]}}
    inspect_model(files, job(lora))
    with pytest.raises(JobError, match="lm_head shares its weights") as caught:
        inspect_model(files, job(lora, ["adapter", "merged"]))
    assert caught.value.reason == Reason.INVALID_SPEC


@pytest.mark.parametrize(
    ("method", "artifacts", "base", "kept"),
    [
        ({"lora": {}}, None, "float32", torch.bfloat16),
        ({"lora": {}}, ["merged"], "float32", torch.float32),
        ({"lora": {}}, ["merged"], "bfloat16", torch.bfloat16),
        ({"freeze": {"lastLayers": 1}}, None, "float32", torch.float32),
        ({"freeze": {"lastLayers": 1}}, None, "bfloat16", torch.bfloat16),
        ({"full": {}}, None, "bfloat16", torch.float32),
    ],
)
def test_frozen_weights_lose_nothing_that_is_published(
    model_folder: Path, method: dict[str, object], artifacts: list[str] | None, base: str, kept: torch.dtype
) -> None:
    """A published whole model has the base's own weights where they were not trained: rounded to bfloat16 they would be others."""
    files = ModelFiles(model_folder, BaseModel("tests/tiny", None, base), "sha256:0", ("model.safetensors",))
    model = load_model(files, job(method, artifacts, precision="bfloat16"), CPU)
    assert model.transformer.get_input_embeddings().weight.dtype == kept
    assert {parameter.dtype for parameter in model.trained_parameters()} == {torch.float32}
