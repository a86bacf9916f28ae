"""Every method with every objective: it learns, goes on after a kill as if nothing had been, and what it publishes is what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.in_process import Finished, KilledError, run_job
from tests.unit.docs.markdown import ROOT
from transformers import AutoModelForCausalLM

import finetune_trainer.methods.bottleneck  # noqa: F401 - what the published folder itself carries for others
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.attention import probe
from finetune_trainer.model import load_model
from finetune_trainer.model_files import fetch_model
from finetune_trainer.sources import Mounts

METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({"full": {}}, 2e-3),
    "freeze": ({"freeze": {"lastLayers": 2}}, 3e-3),
    "lora": ({"lora": {"rank": 8}}, 1e-2),
    "dora": ({"lora": {"rank": 8, "variant": "dora"}}, 1e-2),
    "rslora": ({"lora": {"rank": 8, "alpha": 8, "variant": "rslora"}}, 1e-2),
    "pissa": ({"lora": {"rank": 8, "alpha": 8, "variant": "pissa"}}, 5e-3),
    "adapter": ({"adapter": {"reductionFactor": 4, "placement": "houlsby"}}, 1e-2),
    "ia3": ({"ia3": {}}, 1e-1),
    "promptTuning": ({"promptTuning": {"numVirtualTokens": 8, "initText": "You answer questions."}}, 1e-1),
    "prefixTuning": ({"prefixTuning": {"numVirtualTokens": 8}}, 1e-1),
    "pTuning": ({"pTuning": {"numVirtualTokens": 8}}, 1e-2),
}
"""The methods and their learning rates."""
_TEACHER = {"teacher": {"source": "pvc://quickstart/out/lora/merged"}}
OBJECTIVES: dict[str, tuple[dict[str, Any], float]] = {
    "sft": ({"sft": {}}, 0.95),
    "response": ({"distillation": {**_TEACHER, "response": {"temperature": 2}}}, 0.97),
    "response, topK": ({"distillation": {**_TEACHER, "response": {"topK": 16}}}, 0.97),
    "feature": ({"distillation": {**_TEACHER, "feature": {}}}, 0.97),
    "relation": ({"distillation": {**_TEACHER, "relation": {"between": ["tokens", "examples"]}}}, 0.97),
    "dpo": ({"dpo": {"beta": 0.5}}, 0.95),
}
"""The objectives, and the share of its first value below which the training loss must come."""


@pytest.fixture(scope="module")
def taught(volumes: Path) -> Path:
    """The claim with a teacher on it: the tiny model, tuned a little."""
    spec = {**_spec("lora", "sft", "pvc://quickstart/out/lora"), "training": {**_TRAINING, "epochs": 12, "learningRate": 1e-2}}
    spec["output"]["artifacts"] = ["merged"]
    with pytest.MonkeyPatch.context() as patch:
        run_job(_job(spec, "teacher"), volumes, patch)
    return volumes


_TRAINING = {"epochs": 4, "globalBatchSize": 4, "maxSequenceLength": 256, "precision": "float32", "scheduler": "constant"}


def _spec(method: str, objective: str, storage: str) -> dict[str, Any]:
    data: dict[str, Any] = {name: {"configMap": {"name": "support-data", "key": f"{name}.jsonl"}} for name in ("train", "validation")}
    if objective == "dpo":
        data = {"train": {"configMap": {"name": "support-data", "key": "few-preferences.jsonl"}}, "validation": {"fraction": 0.25}}
    return {
        "model": {"source": "pvc://quickstart/models/tiny-llama"},
        "data": data,
        "method": METHODS[method][0],
        "objective": OBJECTIVES[objective][0],
        "training": {**_TRAINING, "learningRate": METHODS[method][1]},
        "checkpoint": {"everySteps": 3, "keep": 1},
        "output": {"storage": storage},
    }


def _job(spec: dict[str, Any], uid: str) -> FineTuneJob:
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "job", "uid": uid}, "spec": spec}
    return parse_job(json.loads(json.dumps(manifest)), local=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_resumes_and_publishes(
    method: str, objective: str, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[tuple[str, ...]]
) -> None:
    name = f"{method}-{objective}".replace(", ", "-")
    whole = run_job(_job(_spec(method, objective, f"pvc://quickstart/out/{name}-whole"), f"{name}-whole"), taught, monkeypatch)
    losses = whole.losses()
    assert losses[-1] <= OBJECTIVES[objective][1] * losses[0], f"the loss went from {losses[0]} to {losses[-1]}"

    job = _job(_spec(method, objective, f"pvc://quickstart/out/{name}-killed"), f"{name}-killed")
    with pytest.raises(KilledError):
        run_job(job, taught, monkeypatch, kill_at=5)
    rest = run_job(job, taught, monkeypatch, attempt=2)
    resumed = max(abs(one - other) for one, other in zip(rest.losses(), losses[-len(rest.losses()) :], strict=True))
    assert len(rest.losses()) == len(losses) - 3, "it did not go on from step 3"
    assert resumed <= 1e-5

    published = _difference(job, rest, taught, tmp_path)
    assert published <= 1e-5
    table.append((method, objective, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{resumed:.0e}", f"{published:.0e}"))


def _difference(job: FineTuneJob, finished: Finished, volumes: Path, folder: Path) -> float:
    """The largest difference of the logits between what was published, loaded elsewhere, and the last checkpoint, of the largest logit."""
    mounts = Mounts(volumes, local=True)
    files = fetch_model(job.spec.model, mounts, folder / "cache", weights=True)
    model = load_model(files, job, torch.device("cpu"))
    trained = model.module.eval()
    checkpoints = (
        volumes / "claims/quickstart/out" / job.spec.output.storage.rsplit("/", 1)[1] / ".finetune" / job.metadata.uid / "checkpoints"
    )
    last = max(checkpoints.iterdir())
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    state = {name: tensor for file in last.glob("model*.safetensors") for name, tensor in load_file(file).items() if name in names}
    trained.load_state_dict(state, strict=False)

    (artifact,) = finished.report.artifacts
    place = volumes / "claims" / artifact.uri.removeprefix("pvc://")
    base = AutoModelForCausalLM.from_pretrained(ROOT / "examples/models/tiny-llama")
    loaded = PeftModel.from_pretrained(base, place).eval() if artifact.kind == "adapter" else AutoModelForCausalLM.from_pretrained(place)
    tokens = list(range(20, 60))
    with torch.no_grad():
        ours = model.run(probe([tokens], model.layout), logits=True).logits
        assert ours is not None
        theirs = loaded(input_ids=torch.tensor([tokens])).logits[:, -len(tokens) :]  # PEFT's begin with those of a soft prompt
        return float((ours - theirs).abs().max() / theirs.abs().max())
