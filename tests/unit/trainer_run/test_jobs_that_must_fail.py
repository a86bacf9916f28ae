"""Jobs that must fail their gate, whole: useless data, a learning rate that destroys, an overfit. Beside each the job that does not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.in_process import run_job
from tests.tiny_llama import make_tiny_llama, teach_tiny_llama
from tests.unit.trainer_run.test_whole_loop import a_job

from finetune_api.reasons import Reason
from finetune_api.report import Report
from finetune_api.status import EvaluationResult
from finetune_trainer import evaluation_stage
from finetune_trainer.errors import JobError
from finetune_trainer.report import Reporter

ANSWERS = "abcdefghij"
SUITES = [
    {"name": "task", "source": "validation", "metrics": ["exactMatch"], "maxNewTokens": 4},
    {"name": "kept", "source": "pvc://data/kept.jsonl", "role": "forgetting", "metrics": ["loss"]},
]
LEARNS = {"metric": "task/exactMatch", "minImprovement": 0.5, "over": "baseline"}
REMEMBERS = {"metric": "kept/loss", "maxIncrease": 1.0, "over": "baseline"}
GENERALISES = {"metric": "train/gap", "atMost": 0.8}


def questions(count: int, seed: int) -> list[dict[str, str]]:
    """The letter of a digit that stands behind two others."""
    letters = np.random.default_rng(seed).choice(list("uvwxyz"), (count, 2))
    prompts = [f"{first}{second}{number % 10}" for number, (first, second) in enumerate(letters)]
    return [{"prompt": prompt, "completion": ANSWERS[int(prompt[-1])]} for prompt in prompts]


def known_before() -> list[dict[str, str]]:
    """What the model can do before it is tuned: the number after."""
    return [{"prompt": f"{number}, ", "completion": str(number + 1)} for number in range(10, 60)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    volumes = tmp_path_factory.mktemp("volumes")
    claim = volumes / "claims" / "data"
    teach_tiny_llama(make_tiny_llama(claim / "model"), known_before())
    honest = questions(80, seed=1)
    answers = [row["completion"] for row in honest]
    order = np.random.default_rng(3).permutation(len(honest))
    shuffled = [{**row, "completion": answers[place]} for row, place in zip(honest, order, strict=True)]
    tables = {"honest": honest, "shuffled": shuffled, "few": honest[:8], "validation": questions(40, seed=2), "kept": known_before()}
    for name, rows in tables.items():
        (claim / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return volumes


def spec(gate: dict[str, Any], train: str, rate: float, epochs: int) -> dict[str, Any]:
    training = {"epochs": epochs, "globalBatchSize": 8, "maxSequenceLength": 32, "learningRate": rate, "precision": "float32"}
    return {
        "data": {"train": {"source": f"pvc://data/{train}.jsonl"}, "validation": {"source": "pvc://data/validation.jsonl"}},
        "method": {"full": {}},
        "training": {**training, "packing": False, "scheduler": "constant"},
        "evaluation": {"suites": SUITES, "gates": [gate]},
        "checkpoint": {"everySteps": 10, "keep": 1},
    }


def results(report: Report) -> dict[str, EvaluationResult]:
    assert report.evaluation is not None
    return {result.metric: result for result in report.evaluation.results}


def verdicts(report: Report) -> tuple[list[str], dict[str, str]]:
    assert report.evaluation is not None
    return [gate.verdict for gate in report.evaluation.gates], {each.name: each.verdict for each in report.evaluation.health}


def held_back(inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: dict[str, Any]) -> Report:
    """Run a job that must not be published, and look at what it leaves. Returns its last word."""
    told: list[Report] = []
    announce = Reporter.announce

    def heard(self: Reporter, **changes: Any) -> None:
        announce(self, **changes)
        told.append(self.report)

    monkeypatch.setattr(Reporter, "announce", heard)
    (inputs / "claims" / name).mkdir()
    with pytest.raises(JobError, match="0 of 1 gates passed") as raised:
        run_job(a_job(name, **given), inputs, monkeypatch)
    assert raised.value.reason == Reason.GATES_NOT_PASSED
    out = inputs / "claims" / name / "out"
    own = out / ".finetune" / name
    assert {path.name for path in out.iterdir()} == {".finetune", "report"}  # nothing where a result would be
    assert (own / "held" / "model" / "model.safetensors").is_file()
    assert (own / "held" / "manifest.json").is_file()
    assert not (own / "result").exists()
    assert not (own / "publishing.json").exists()
    text = next((out / "report").rglob("report.md")).read_text()
    assert "**Failed**" in text
    assert given["evaluation"]["gates"][0]["metric"] in text
    assert not told[-1].artifacts
    return told[-1]


def published(inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: dict[str, Any]) -> Report:
    (inputs / "claims" / name).mkdir()
    report = run_job(a_job(name, **given), inputs, monkeypatch).report
    assert [artifact.kind for artifact in report.artifacts] == ["model"]
    assert (inputs / "claims" / name / "out" / "model" / "model.safetensors").is_file()
    assert verdicts(report)[0] == ["Passed"]
    return report


def test_useless_data_is_not_published(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers stand at other questions: what is learnt is the letters, and not which. With the answers in place it is published."""
    report = held_back(inputs, monkeypatch, "useless", spec(LEARNS, "shuffled", 0.01, 10))
    assert verdicts(report)[0] == ["Failed"]
    found = results(report)
    assert found["task/exactMatch"].value is not None
    assert found["task/exactMatch"].value < 0.4
    losses = found["validation/loss"]
    assert losses.value is not None
    assert losses.baseline is not None
    assert losses.value < losses.baseline - 1  # the loss alone would have been taken for a success


def test_honest_data_is_published(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = published(inputs, monkeypatch, "honest", spec(LEARNS, "honest", 0.01, 10))
    low = results(report)["task/exactMatch"].low
    assert low is not None
    assert low > 0.5


@pytest.mark.parametrize("rate", [0.3, 1e-5])
def test_a_learning_rate_that_destroys_is_not_published(rate: float, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be done before is lost. With a small one it is not."""
    given = spec(REMEMBERS, "honest", rate, 1)
    report = held_back(inputs, monkeypatch, "forgets", given) if rate > 0.1 else published(inputs, monkeypatch, "remembers", given)
    gates, health = verdicts(report)
    assert (gates, health["forgetting"]) == ((["Failed"], "Bad") if rate > 0.1 else (["Passed"], "Good"))
    loss = results(report)["kept/loss"]
    assert loss.baseline is not None
    assert loss.baseline < 1.5  # it could: the numbers' first digits are half of what there is to know
    assert loss.difference is not None
    assert loss.difference.low is not None
    assert (loss.difference.low > 1.0) == (rate > 0.1)


def test_an_overfit_is_not_published(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight examples, learnt by heart in forty epochs: the training loss falls to nothing, the validation loss rises again."""
    report = held_back(inputs, monkeypatch, "overfit", spec(GENERALISES, "few", 0.01, 40))
    gates, health = verdicts(report)
    assert (gates, health["overfitting"]) == (["Failed"], "Bad")
    gap = results(report)["train/gap"].value
    assert gap is not None
    assert gap > 1.5


def test_earlier_checkpoints_are_tried_and_no_later_ones(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Early stopping goes back to an early step, and checkpoints of later ones are still there: they are worse, and not tried."""
    judged: list[int] = []
    evaluate = evaluation_stage.evaluate

    def seen(attempt: Any, preparation: Any, result: Any, crew: Any) -> Any:
        judged.append(result.steps)
        return evaluate(attempt, preparation, result, crew)

    monkeypatch.setattr(evaluation_stage, "evaluate", seen)
    given = spec({"metric": "task/exactMatch", "atLeast": 0.99}, "few", 0.01, 60)
    given["training"]["earlyStopping"] = {"patience": 2}
    given["checkpoint"] = {"everySteps": 5, "keep": 5}
    given["evaluation"]["onGateFailure"] = "tryEarlierCheckpoint"
    held_back(inputs, monkeypatch, "stopped", given)
    steps = {int(path.name.removeprefix("step-")) for path in (inputs / "claims").glob("stopped/out/.finetune/stopped/checkpoints/step-*")}
    assert max(steps) > judged[0]
    assert len(judged) > 1
    assert max(judged[1:]) < judged[0]
