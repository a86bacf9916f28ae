"""Every artifact of every method, loaded as its own card says, by a process in which this project cannot be imported."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from tiny_models import job_manifest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from tuned import INPUT, shake

from finetune_api.status import Evaluation, Resolved
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.export import publish
from finetune_trainer.methods import method_for
from finetune_trainer.methods.method import BaseModel, count_parameters
from finetune_trainer.model import CausalModel
from finetune_trainer.model_card import Publication
from finetune_trainer.result import Result, write_result
from finetune_trainer.storage import Storage

METHODS: dict[str, dict[str, object]] = {
    "full": {"full": {}},
    "freeze": {"freeze": {"lastLayers": 1, "head": True}},
    "lora": {"lora": {"rank": 4}},
    "dora": {"lora": {"rank": 4, "variant": "dora"}},
    "rslora": {"lora": {"rank": 4, "variant": "rslora"}},
    "pissa": {"lora": {"rank": 4, "variant": "pissa"}},
    "adapter": {"adapter": {"placement": "houlsby"}},
    "ia3": {"ia3": {}},
    "prompt": {"promptTuning": {"numVirtualTokens": 3, "initText": "hi"}},
    "prefix": {"prefixTuning": {"numVirtualTokens": 3, "projectionSize": 8}},
    "ptuning": {"pTuning": {"numVirtualTokens": 3, "encoder": "lstm"}},
}
READER = """
import pathlib, sys
for name in ("finetune_trainer", "finetune_api"):
    sys.modules[name] = None  # importing it is an error from here on
import torch
from safetensors.torch import save_file
root, found, paths = pathlib.Path(sys.argv[1]), {}, list(sys.path)
for card in sorted(root.glob("*/*/README.md")):
    names = {}
    code = card.read_text().split("```python\\n")[1].split("```")[0]
    exec(code.replace("path/to/this/folder", str(card.parent)), names)
    with torch.no_grad():
        found["/".join(card.parts[-3:-1])] = names["model"].eval()(torch.tensor(INPUT)).logits
    assert names["tokenizer"]("hi")["input_ids"]
    sys.path[:] = paths
save_file(found, root / "logits.safetensors")
"""


def job_of(method: dict[str, object]) -> FineTuneJob:
    kind = next(iter(method))
    artifacts = {"full": ["model"], "freeze": ["model"], "lora": ["adapter", "merged"], "ia3": ["adapter", "merged"]}.get(kind, ["adapter"])
    return parse_job(job_manifest(method=method, output={"storage": "file:///out", "artifacts": artifacts}), local=True)


def published(job: FineTuneJob, place: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Tune, after a fashion, and publish. Returns the logits that the training saw."""
    method, base = method_for(job.spec.method), BaseModel(str(folder), None, "float32")
    transformer = AutoModelForCausalLM.from_pretrained(folder)
    module = method.apply(transformer, seed=1, tokenizer=tokenizer)
    shake(module)
    model = CausalModel(module.eval(), transformer, "padded", True, torch.float32, torch.device("cpu"))
    nothing = torch.empty(0, dtype=torch.int64)
    batch = MicroBatch(INPUT, nothing, torch.arange(INPUT.shape[1])[None], nothing, (INPUT.shape[1],), "padded")
    with torch.no_grad():
        logits = model.run(batch, logits=True).logits
    assert logits is not None
    storage = Storage(LocalFileSystem(), str(place), "file:///out")
    result = Result(1, 1, {"test": 2.0}, {"test": 1.0}, {}, kinds=job.spec.artifacts)
    counts = count_parameters(module)
    write_result(storage.at("own"), result, lambda to, kind: method.export(module, to, base, kind))
    resolved = Resolved(model_revision="r", data_digest="sha256:d", config_digest="sha256:c")
    publish(Publication(job, base, tokenizer, result, resolved, Evaluation(), counts), storage, storage.at("own"))
    return logits


@pytest.fixture(scope="module")
def logits(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By method/kind: the logits that the training saw, and those of the model that a card's code loads."""
    root = tmp_path_factory.mktemp("published")
    expected = {}
    for name, method in METHODS.items():
        job = job_of(method)
        seen = published(job, root / name, model_folder, tokenizer)
        expected |= {f"{name}/{kind}": seen for kind in job.spec.artifacts}
    code = READER.replace("INPUT", repr(INPUT.tolist()))
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, cwd=root, timeout=250)
    found = load_file(root / "logits.safetensors")
    assert found.keys() == expected.keys()
    return {
        name: (expected[name], found[name][:, -INPUT.shape[1] :]) for name in expected
    }  # PEFT also gives those of a prompt of embeddings


@pytest.mark.parametrize("artifact", [f"{name}/{kind}" for name, method in METHODS.items() for kind in job_of(method).spec.artifacts])
def test_what_is_published_loads_as_its_card_says(logits: dict[str, tuple[torch.Tensor, torch.Tensor]], artifact: str) -> None:
    seen, loaded = logits[artifact]
    torch.testing.assert_close(loaded, seen, rtol=0, atol=1e-5)


def test_the_artifacts_differ(logits: dict[str, tuple[torch.Tensor, torch.Tensor]], model_folder: Path) -> None:
    """So that equal logits mean something: none of them is the base model's."""
    base = AutoModelForCausalLM.from_pretrained(model_folder)(INPUT).logits.detach()
    assert all(float((loaded - base).abs().max()) > 1e-3 for _, loaded in logits.values())
