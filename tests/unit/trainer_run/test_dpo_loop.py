"""Preference learning from the rows to the result: it learns what is preferred, and goes on exactly after an interruption."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_export import publication
from test_loop import CPU, Listener, Together, storage_in
from tests.prepared_data import prepare_data
from tests.tiny_llama import make_tiny_llama

from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.data.examples import Prepared
from finetune_trainer.evaluation import compare
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model import load_model, load_tokenizer
from finetune_trainer.model_card import model_card
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.sources import Mounts
from finetune_trainer.worker import Worker

Figures = dict[str, float]


def rows(start: int, count: int) -> str:
    """The polite answer is the chosen one, whatever the question; both are of many lengths."""
    pairs = [(f"Question {number}? ", "please" + "!" * (number % 5), "no" + "." * (number % 7)) for number in range(start, start + count)]
    return "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))) + "\n" for pair in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    make_tiny_llama(folder / "model", width=32)
    for split, start, count in (("train", 0, 24), ("validation", 100, 8), ("test", 200, 6)):
        (folder / f"{split}.jsonl").write_text(rows(start, count))
    return folder


def job_in(folder: Path, method: dict[str, Any], **training: Any) -> FineTuneJob:
    given = {"epochs": 3, "globalBatchSize": 4, "maxSequenceLength": 64, "learningRate": 0.005, "precision": "float32", "packing": False}
    spec = {
        "model": {"source": f"file://{folder}/model"},
        "data": {split: {"source": f"file://{folder}/{split}.jsonl"} for split in ("train", "validation", "test")},
        "method": method,
        "objective": {"dpo": {"beta": 0.5}},
        "training": {**given, **training},
        "checkpoint": {"everySteps": 6},
        "output": {"storage": "file:///unused"},
    }
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "a", "uid": "u"}, "spec": spec}
    return parse_job(manifest, local=True)


def ready(folder: Path, job: FineTuneJob) -> tuple[ModelFiles, Prepared]:
    files = fetch_model(job.spec.model, Mounts(folder, local=True), folder / "cache", weights=True)
    return files, prepare_data(job, load_tokenizer(files), Mounts(folder, local=True))


def run(folder: Path, out: Path, method: dict[str, Any], listener: Listener | None = None, **training: Any) -> bool:
    job = job_in(folder, method, **training)
    files, data = ready(folder, job)
    task = Task(job, files.base, {}, storage_in(out))
    return train(task, Models(load_model(files, job, CPU)), data, Worker(), listener or Listener())


def figures(out: Path) -> tuple[Figures, Figures]:
    manifest = json.loads((out / "result" / "manifest.json").read_text())
    return manifest["before"], manifest["after"]


@pytest.mark.parametrize(
    ("method", "rate", "falls"),
    [({"lora": {"rank": 4}}, 0.005, 0.2), ({"full": {}}, 0.001, 0.2), ({"promptTuning": {"numVirtualTokens": 4}}, 0.2, 0.1)],
    ids=["lora", "full", "promptTuning"],
)
def test_it_learns_what_is_preferred(folder: Path, tmp_path: Path, method: dict[str, Any], rate: float, falls: float) -> None:
    listener = Listener()
    assert run(folder, tmp_path, method, listener, learningRate=rate)
    before, after = figures(tmp_path)
    assert (
        before.keys()
        == after.keys()
        == {split + figure for split in ("validation", "test") for figure in ("", "/rewardAccuracy", "/rewardMargin")}
    )
    for split in ("validation", "test"):
        if "promptTuning" not in method:  # whose prompt already says something before the first step
            assert before[split] == pytest.approx(math.log(2), abs=1e-6)
            assert (before[f"{split}/rewardAccuracy"], before[f"{split}/rewardMargin"]) == (0.5, 0.0)
        assert after[split] < before[split] - falls
        assert after[f"{split}/rewardAccuracy"] == 1.0
        assert after[f"{split}/rewardMargin"] > before[f"{split}/rewardMargin"] + 2 * falls
    told = {metric.name: metric.value for metric in listener.told[-1].metrics}
    assert told["train/loss"] < math.log(2) - falls
    assert told["validation/rewardAccuracy"] == 1.0
    assert told["validation/loss"] == pytest.approx(after["validation"], abs=1e-6)


def test_the_comparison_has_no_perplexity_of_preferences() -> None:
    before = {"validation": 0.7, "validation/rewardMargin": 0.0, "validation/rewardAccuracy": 0.5, "test": 0.7}
    after = before | {"validation": 0.4, "validation/rewardAccuracy": 1.0}
    results = compare(before, after, per_token=False).results
    assert [(result.metric, result.baseline, result.value) for result in results] == [
        ("validation/loss", 0.7, 0.4),
        ("validation/rewardAccuracy", 0.5, 1.0),
        ("validation/rewardMargin", 0.0, 0.0),
        ("test/loss", 0.7, 0.7),
    ]


def test_the_card_says_what_the_figures_are(folder: Path, tmp_path: Path) -> None:
    of_pairs = replace(publication(storage_in(tmp_path)), job=job_in(folder, {"lora": {"rank": 4}}))
    card = model_card(of_pairs, "adapter")
    assert 'tags: ["lora", "dpo"]' in card
    assert "Losses are means per pair of answers" in card
    assert "one whose answers have equal rewards counting one half" in card
    assert "labelled token" not in card


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "result" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("packing", [False, True])
def test_an_interrupted_run_ends_as_an_undisturbed_one(folder: Path, tmp_path: Path, packing: bool) -> None:
    lora = {"lora": {"rank": 4, "dropout": 0.1}}
    assert run(folder, tmp_path / "undisturbed", lora, packing=packing)
    assert not run(folder, tmp_path / "stopped", lora, Listener(stop_after=2), packing=packing)
    references = (tmp_path / "stopped" / "references" / "train.npy").read_bytes()
    assert run(folder, tmp_path / "stopped", lora, packing=packing)
    assert (tmp_path / "stopped" / "references" / "train.npy").read_bytes() == references
    assert figures(tmp_path / "stopped") == figures(tmp_path / "undisturbed")
    undisturbed = weights(tmp_path / "undisturbed")
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in weights(tmp_path / "stopped").items())


def test_two_workers_come_to_what_one_does(folder: Path, tmp_path: Path) -> None:
    job = job_in(folder, {"lora": {"rank": 4}}, epochs=1)
    files, data = ready(folder, job)
    assert train(Task(job, files.base, {}, storage_in(tmp_path / "one")), Models(load_model(files, job, CPU)), data, Worker(), Listener())
    together, task = Together(2), Task(job, files.base, {}, storage_in(tmp_path / "two"))
    models = [load_model(files, job, CPU) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(train, task, Models(model), data, together.worker(rank), Listener()) for rank, model in enumerate(models)]
        assert [one.result() for one in both] == [True, True]
    assert figures(tmp_path / "two")[1] == pytest.approx(figures(tmp_path / "one")[1], abs=1e-4)
    alone = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, alone[name], atol=1e-4, rtol=1e-3)
