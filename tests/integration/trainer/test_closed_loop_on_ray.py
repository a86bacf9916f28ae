"""The closed loop on real Ray: workers write examples, a search goes by a suite's metric, and tasks of lm-eval are asked of both models."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.trainer.harness import Pods
from tests.tiny_llama import make_tiny_llama, teach_tiny_llama, write_questions
from tests.unit.trainer.fake_hub import FakeHub

from finetune_api.report import EXIT_SUCCEEDED, Report

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

PATIENCE = 1200.0
"""Seven groups of workers are started, one after the other."""
RULE = "Late tools cost 2 euros a day."
POINT = "Late tools cost 2 euros"
OUTPUTS = [f"Tool {number} is late, which costs 2 euros." for number in range(6)]
SUMS = [{"context": f"Q: What is ({a} + 1) * 2?\n\nA:", "completion": f" {(a + 1) * 2}"} for a in range(8)]
"""As the task arithmetic_1dc has its rows."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes the one point that there is, whatever output it is shown."""
    folder = tmp_path_factory.mktemp("inputs")
    told = [{"prompt": f"[1] {RULE}\n{output}\nPoints:\n", "completion": f"- {POINT}"} for output in OUTPUTS]
    teach_tiny_llama(make_tiny_llama(folder / "model"), told, steps=80)
    (folder / "handbook.txt").write_text(RULE)
    (folder / "golden.jsonl").write_text("".join(json.dumps({"text": output}) + "\n" for output in OUTPUTS))
    write_questions(folder / "train.jsonl", 30)
    write_questions(folder / "validation.jsonl", 10, start=100)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """The hub that the pods ask for the task's rows."""
    rows = "".join(json.dumps(row) + "\n" for row in SUMS).encode()
    server = FakeHub({}, {"data/single_digit_three_ops.jsonl": rows}, "EleutherAI/arithmetic")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def spec(inputs: Path, output: Path) -> dict[str, Any]:
    points = {
        "knowledgeBase": {"source": f"file://{inputs}/handbook.txt"},
        "goldenOutputs": {"source": f"file://{inputs}/golden.jsonl"},
        "instruction": "{passages}\n{output}\nPoints:\n",
        "prompt": "{points}\n",
        "maxNewTokens": 40,
    }
    suites = [
        {"name": "task", "source": "validation", "metrics": ["tokenAccuracy", "exactMatch"], "maxNewTokens": 8},
        {"name": "sums", "lmEval": {"tasks": ["arithmetic_1dc"]}, "limit": 6},
    ]
    search = {
        "parameters": {"training.learningRate": {"choice": [1e-8, 1e-2]}},
        "trials": 2,
        "algorithm": "grid",
        "goal": {"metric": "task/tokenAccuracy", "mode": "max"},
        "epochs": 2,
    }
    return {
        "model": {"source": f"file://{inputs}/model"},
        "data": {
            **{name: {"source": f"file://{inputs}/{name}.jsonl"} for name in ("train", "validation")},
            "preparation": {"contentPoints": points},
        },
        "method": {"lora": {"rank": 4}},
        "training": {"epochs": 3, "globalBatchSize": 6, "maxSequenceLength": 128, "packing": False, "precision": "float32"},
        "compute": {"workers": {"min": 1, "max": 1}},
        "output": {"storage": f"file://{output}"},
        "evaluation": {"suites": suites, "gates": [{"metric": "task/tokenAccuracy", "minImprovement": 0.0, "over": "baseline"}]},
        "search": search,
    }


def answers(own: Path) -> dict[str, list[str]]:
    """The files of each candidate's answers."""
    return {folder.name: sorted(file.name for file in folder.iterdir() if file.is_file()) for folder in sorted((own / "answers").iterdir())}


def changed_at(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_loop_with_workers_in_every_stage_and_a_head_that_is_killed(inputs: Path, tmp_path: Path, hub: FakeHub) -> None:
    """Killed once the first trial is measured: no text is written, no trial trained and no answer given twice."""
    output = tmp_path / "out"
    with Pods(tmp_path / "pods", spec(inputs, output)) as pods:
        pods.patience, own = PATIENCE, output / ".finetune" / pods.uid
        pods.start_head()
        assert pods.follow(first_trial_is_measured) is not None, pods.log()
        pods.kill_head()
        pods.stop_workers()
        written = changed_at(output / ".finetune" / "cache" / "made")
        first = json.loads((own / "trials" / "1" / "trial.json").read_text())
        assert first["state"] == "Completed"
        assert list(answers(own)) == ["generator", "trial-1-step-12"]
        known = changed_at(own / "answers" / "trial-1-step-12")

        pods.start_head()
        code, report = pods.ended()
        assert code == EXIT_SUCCEEDED, pods.log()

    told = pods.reports[-1]  # the head waits until it is read: its last word has no room for the samples
    assert told.outcome == "Succeeded"
    assert told.data is not None
    assert (told.data.made, told.data.train) == (6, 36)
    assert told.data.made_samples[0] == f"- {POINT}\n -> {OUTPUTS[0]}"
    assert changed_at(output / ".finetune" / "cache" / "made") == written
    assert json.loads((own / "trials" / "1" / "trial.json").read_text()) == first
    assert changed_at(own / "answers" / "trial-1-step-12") == known

    assert report.search is not None
    assert report.search.best is not None
    assert (report.search.best.trial, report.search.best.parameters) == (2, {"training.learningRate": 1e-2})
    assert first["value"] < report.search.best.value <= 1  # a rate of next to nothing leaves the untuned model's accuracy

    assert report.evaluation is not None
    results = {result.metric: result for result in report.evaluation.results}
    assert results["task/tokenAccuracy"].baseline == pytest.approx(first["value"])
    sums = results["sums/arithmetic_1dc"]
    assert (sums.n, sums.baseline) == (6, 0.0)
    assert [gate.verdict for gate in report.evaluation.gates] == ["Passed"]
    assert answers(own)["baseline"] == answers(own)["step-18"] == ["sums.tasks.json", "task.jsonl"]
    assert set(hub.fetched) == {"data/single_digit_three_ops.jsonl"}
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


def first_trial_is_measured(report: Report) -> bool:
    return report.search is not None and report.search.completed >= 1
