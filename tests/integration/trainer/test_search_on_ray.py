"""The search on real Ray: trials beside each other, gone on with after a kill, and ended early."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.integration.trainer.harness import Pods
from tests.tiny_llama import make_tiny_llama, write_questions

from finetune_api.report import EXIT_SUCCEEDED, Report

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

PATIENCE = 1200.0
"""A trial starts a handful of processes."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_llama(folder / "model")
    write_questions(folder / "train.jsonl", 60)
    write_questions(folder / "validation.jsonl", 10, start=100)
    return folder


def spec(inputs: Path, output: Path, search: dict[str, Any], *, workers: int) -> dict[str, Any]:
    return {
        "model": {"source": f"file://{inputs}/model"},
        "data": {name: {"source": f"file://{inputs}/{name}.jsonl"} for name in ("train", "validation")},
        "method": {"lora": {"rank": 4}},
        "training": {"epochs": 4, "globalBatchSize": 12, "maxSequenceLength": 64, "packing": False, "precision": "float32"},
        "compute": {"workers": {"min": workers, "max": workers}},
        "output": {"storage": f"file://{output}"},
        "search": search,
    }


def trials_in(pods: Pods, output: Path) -> dict[int, dict[str, Any]]:
    records = (output / ".finetune" / pods.uid / "trials").glob("*/trial.json")
    found = [json.loads(record.read_text()) for record in records]
    return {trial["number"]: trial for trial in sorted(found, key=lambda trial: trial["number"])}


def completed(count: int) -> Any:
    return lambda report: report.search is not None and report.search.completed >= count


def searched(report: Report) -> tuple[int, int, int, int]:
    assert report.search is not None
    return report.search.trials, report.search.completed, report.search.failed, report.search.pruned


def test_trials_run_beside_each_other_and_a_killed_head_repeats_none_that_has_ended(inputs: Path, tmp_path: Path) -> None:
    """Then the best values are trained with, for the job's own epochs, and what is published says so."""
    search = {
        "parameters": {"training.learningRate": {"logUniform": [1e-5, 1e-2]}, "method.lora.rank": {"choice": [2, 8]}},
        "trials": 4,
        "parallel": 2,
        "epochs": 2,
    }
    output = tmp_path / "out"
    with Pods(tmp_path / "pods", spec(inputs, output, search, workers=2)) as pods:
        pods.patience = PATIENCE
        pods.start_head()
        assert pods.follow(completed(1)) is not None, pods.log()
        pods.kill_head()
        pods.stop_workers()
        before = {number: trial for number, trial in trials_in(pods, output).items() if trial["state"] == "Completed"}
        assert 1 <= len(before) < 4

        pods.start_head()
        code, report = pods.ended()
        assert code == EXIT_SUCCEEDED, pods.log()

    trials = trials_in(pods, output)
    assert list(trials) == [1, 2, 3, 4]
    assert {trial["state"] for trial in trials.values()} == {"Completed"}
    assert {number: trials[number] for number in before} == before
    assert {path.name for path in (output / ".finetune" / pods.uid / "trials").glob("*/*")} == {"trial.json"}

    assert searched(report) == (4, 4, 0, 0)
    best = min(trials.values(), key=lambda trial: trial["value"])
    assert report.search is not None
    assert report.search.best is not None
    assert (report.search.best.trial, report.search.best.value, report.search.best.parameters) == (
        best["number"],
        best["value"],
        best["values"],
    )
    assert report.progress is not None
    assert (report.progress.epoch, report.progress.total_steps) == (4, 20)
    adapter = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == best["values"]["method.lora.rank"]


def test_a_trial_whose_loss_falls_behind_is_ended_early(inputs: Path, tmp_path: Path) -> None:
    """At a quarter of the steps, a trial that does not learn is behind one that does. Of 20 steps every second one is measured."""
    parameters = {"training.learningRate": {"choice": [1e-2, 1e-8]}}
    search = {"parameters": parameters, "trials": 2, "algorithm": "grid", "pruning": "asha"}
    output = tmp_path / "out"
    with Pods(tmp_path / "pods", spec(inputs, output, search, workers=1)) as pods:
        pods.patience = PATIENCE
        pods.start_head()
        code, report = pods.ended()
        assert code == EXIT_SUCCEEDED, pods.log()
    trials = trials_in(pods, output)
    assert [trial["values"]["training.learningRate"] for trial in trials.values()] == [1e-2, 1e-8]
    assert [trial["state"] for trial in trials.values()] == ["Completed", "Pruned"]
    assert [share for share, _ in trials[2]["course"]] == [0.1, 0.2, 0.3]
    assert searched(report) == (2, 1, 0, 1)
