"""The whole loop in one process: a baseline of prompts, training, suites, gates, and what is published or held back, with its report."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.builders import raw_job
from tests.in_process import Finished, KilledError, run_job
from tests.tiny_llama import make_tiny_llama, write_questions

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer import evaluation_stage, worker_group
from finetune_trainer.errors import JobError

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


def refuse(*_: Any, **__: Any) -> None:
    pytest.fail("something was done again")


@pytest.mark.parametrize(("on_failure", "kept"), [("hold", True), ("fail", False)])
def test_a_model_that_misses_a_gate_is_not_published(on_failure: str, kept: bool, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve questions of which none is answered right: with 0 of 12 the share is below 0.27 for sure."""
    gates = [{"metric": "task/exactMatch", "atLeast": 0.9}]
    job = a_job(on_failure, evaluation={"suites": SUITES, "gates": gates, "onGateFailure": on_failure})
    with pytest.raises(JobError, match="task/exactMatch") as raised:
        run(inputs, monkeypatch, job)
    assert raised.value.reason == Reason.GATES_NOT_PASSED
    out = inputs / "claims" / on_failure / "out"
    assert not (out / "adapter").exists()
    assert (out / ".finetune" / on_failure / "held" / "adapter").exists() == kept
    report = next(out.rglob("report.md")).read_text()
    assert "task/exactMatch" in report
    assert "Failed" in report

    if kept:  # then a second attempt comes to the same end, and nobody is asked or trained again
        monkeypatch.setattr(worker_group, "_train_on_worker", refuse)
        monkeypatch.setattr(worker_group, "_answer_on_worker", refuse)
        with pytest.raises(JobError, match="task/exactMatch"):
            run_job(job, inputs, monkeypatch, attempt=2)


def test_a_prompt_that_is_enough_trains_nothing(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = {"prompts": [{"name": "plain"}], "sufficientIf": {"metric": "task/loss", "atMost": 100.0}}
    with monkeypatch.context() as patch:
        patch.setattr(worker_group, "_train_on_worker", refuse)
        done = run(inputs, patch, a_job("enough", evaluation={"suites": SUITES}, baseline=baseline))
    assert done.report.sufficient
    assert not done.report.artifacts
    out = inputs / "claims" / "enough" / "out"
    assert not (out / "adapter").exists()
    assert "sufficientIf" in next(out.rglob("report.md")).read_text()


def test_the_best_earlier_checkpoint_that_passes_is_published(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model after its last step is said to fail; what is published is another one, exported from its checkpoint."""
    gates = [{"metric": "task/loss", "maxIncrease": 0.0, "over": "baseline"}, {"metric": "train/gap", "atMost": 100.0}]
    training = {"epochs": 2, "globalBatchSize": 12, "maxSequenceLength": 64, "learningRate": 0.02, "precision": "float32", "packing": False}
    training |= {"scheduler": "constant", "warmupRatio": 0.0}
    spec = {"training": training, "checkpoint": {"everySteps": 2, "keep": 4}}
    judged: list[int] = []
    evaluate = evaluation_stage.evaluate

    def seen(attempt: Any, preparation: Any, result: Any, crew: Any) -> Any:
        judged.append(result.steps)
        judgement = evaluate(attempt, preparation, result, crew)
        if result.steps != 8:
            return judgement
        gates = tuple(gate.model_copy(update={"verdict": "Failed"}) for gate in judgement.evaluation.gates)
        spoilt = judgement.evaluation.model_copy(update={"gates": gates})
        attempt.reporter.announce(evaluation=spoilt)
        return evaluation_stage.Judgement(spoilt, judgement.samples, judgement.course)

    monkeypatch.setattr(evaluation_stage, "evaluate", seen)
    plan = {"suites": SUITES, "gates": gates, "onGateFailure": "tryEarlierCheckpoint"}
    done = run(inputs, monkeypatch, a_job("earlier", evaluation=plan, **spec))
    assert judged[0] == 8
    assert done.report.evaluation is not None
    assert done.report.evaluation.candidate == judged[-1] != 8
    manifest = json.loads((inputs / "claims" / "earlier" / "out" / "adapter" / "manifest.json").read_text())
    assert manifest["steps"] == judged[-1]


def test_a_head_that_was_killed_asks_and_trains_nothing_twice(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after ten steps, and again before it publishes: the baseline's answers, the result and the tuned answers are those it had."""
    baseline = {"prompts": [{"name": "shown", "examples": 2}]}
    job = a_job("killed", evaluation={"suites": SUITES}, baseline=baseline)
    (inputs / "claims" / "killed").mkdir()
    own = inputs / "claims" / "killed" / "out" / ".finetune" / "killed"
    with pytest.raises(KilledError):
        run_job(job, inputs, monkeypatch, attempt=1, kill_at=10)
    asked = {path: path.stat().st_mtime_ns for path in sorted((own / "answers").rglob("*.jsonl"))}
    assert {path.parent.name for path in asked} == {"baseline", "prompt-shown"}

    with monkeypatch.context() as patch:
        patch.setattr("finetune_trainer.run.publish", killed)
        with pytest.raises(KilledError):
            run_job(job, inputs, patch, attempt=2)
    after = {path: path.stat().st_mtime_ns for path in sorted((own / "answers").rglob("*.jsonl"))}
    assert {path: after[path] for path in asked} == asked
    (tuned,) = {path.parent.name for path in after} - {"baseline", "prompt-shown"}
    assert tuned.startswith("step-")

    monkeypatch.setattr(worker_group, "_train_on_worker", refuse)
    monkeypatch.setattr(worker_group, "_answer_on_worker", refuse)
    done = run_job(job, inputs, monkeypatch, attempt=3)
    assert [artifact.kind for artifact in done.report.artifacts] == ["adapter"]


def killed(*_: Any, **__: Any) -> None:
    raise KilledError
