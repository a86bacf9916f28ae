"""The whole loop in one process: a baseline of prompts, training, suites, gates, and what is published or held back, with its report."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.builders import raw_job
from tests.in_process import Finished, run_job
from tests.tiny_llama import make_tiny_llama, write_questions

from finetune_api.v1alpha1 import FineTuneJob, parse_job

SUITES = [
    {"name": "task", "source": "validation", "metrics": ["loss", "exactMatch", "f1"], "maxNewTokens": 12},
    {"name": "retention", "source": "pvc://data/other.jsonl", "role": "forgetting", "metrics": ["loss"]},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    volumes = tmp_path_factory.mktemp("volumes")
    claim = volumes / "claims" / "data"
    make_tiny_llama(claim / "model")
    write_questions(claim / "train.jsonl", 48)
    write_questions(claim / "validation.jsonl", 12, start=100)
    rows = [{"text": f"{number} and {number} again"} for number in range(8)]
    (claim / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return volumes


def a_job(name: str, **spec: Any) -> FineTuneJob:
    given = {
        "model": {"source": "pvc://data/model"},
        "data": {part: {"source": f"pvc://data/{part}.jsonl"} for part in ("train", "validation")},
        "training": {"epochs": 12, "globalBatchSize": 4, "maxSequenceLength": 64, "learningRate": 0.02, "precision": "float32"},
        "compute": {"workers": {"min": 1, "max": 1}},
        "output": {"storage": f"pvc://{name}/out"},
        **spec,
    }
    manifest = raw_job(uid=name, **given)
    return parse_job({key: value for key, value in manifest.items() if key != "status"})


def run(inputs: Path, monkeypatch: pytest.MonkeyPatch, job: FineTuneJob) -> Finished:
    (inputs / "claims" / job.spec.output.storage.split("/")[2]).mkdir(exist_ok=True)
    return run_job(job, inputs, monkeypatch)


def test_a_model_that_passes_its_gates_is_published_with_the_evidence(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gates = [{"metric": "task/loss", "minImprovement": 0.05, "over": "baseline"}, {"metric": "validation/loss", "atMost": 5.45}]
    baseline = {"prompts": [{"name": "plain"}, {"name": "shown", "examples": 2}, {"name": "told", "system": "Say the digit."}]}
    done = run(inputs, monkeypatch, a_job("good", evaluation={"suites": SUITES, "gates": gates}, baseline=baseline))
    report = done.report
    assert report.evaluation is not None
    assert [gate.verdict for gate in report.evaluation.gates] == ["Passed", "Passed"]
    assert [entry.prompt for entry in report.baseline] == ["plain", "shown", "told"]
    assert {entry.metric for entry in report.baseline} == {"task/exactMatch"}
    results = {result.metric: result for result in report.evaluation.results}
    loss = results["task/loss"]
    assert loss.value is not None
    assert loss.baseline is not None
    assert loss.low is not None
    assert loss.high is not None
    assert loss.low < loss.value < loss.high < loss.baseline
    assert loss.value == pytest.approx(results["validation/loss"].value, rel=1e-5)  # the same examples, measured in two ways
    assert {"task/exactMatch", "task/f1", "retention/loss", "train/gap"} <= results.keys()
    assert {health.name for health in report.evaluation.health} == {"forgetting", "overfitting"}
    out = inputs / "claims" / "good" / "out"
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    text = next(out.rglob("report.md")).read_text()
    assert "task/exactMatch" in text
    assert "Passed" in text
