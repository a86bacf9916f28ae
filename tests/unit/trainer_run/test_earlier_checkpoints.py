"""A job that is compared with its own earlier checkpoints: what each would be measured to be alone stands beside the results."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.in_process import Finished, KilledError, run_job
from tests.unit.trainer_run.looped_job import make_inputs, own_folder
from tests.unit.trainer_run.test_whole_loop import SUITES, a_job

from finetune_api.status import Difference
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer import answering, evaluation_stage, run, worker_group
from finetune_trainer.attempt import Attempt
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation_stage import Judgement, evaluate

TRAINING = {"epochs": 2, "globalBatchSize": 12, "maxSequenceLength": 64, "learningRate": 0.02, "precision": "float32", "packing": False}
CHECKPOINTS = {"everySteps": 2, "keep": 3}
"""Of eight steps: those of step 4, 6 and 8 are kept."""


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return make_inputs(tmp_path)


def job(*compare_with: str, **plan: Any) -> FineTuneJob:
    data = {part: {"source": f"pvc://data/{part}.jsonl"} for part in ("train", "validation", "test")}
    evaluation = {"suites": SUITES, "compareWith": list(compare_with or ("baseline", "checkpoints")), **plan}
    return a_job("job", data=data, training=TRAINING, checkpoint=CHECKPOINTS, evaluation=evaluation)


def checkpoint_file(inputs: Path, step: int) -> Path:
    return own_folder(inputs) / "checkpoints" / f"step-{step:08d}" / "model.safetensors"


def compared(done: Finished) -> dict[str, dict[str, tuple[float | None, Difference | None]]]:
    """By the other and the metric."""
    assert done.report.evaluation is not None
    found: dict[str, dict[str, Any]] = {}
    for result in done.report.evaluation.results:
        for other in result.compared:
            found.setdefault(other.other, {})[result.metric] = (other.value, other.difference)
    return found


def test_each_has_the_figures_that_it_has_when_it_is_evaluated_by_itself(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job itself takes them one after the other where its gate is not passed: each is a candidate of its own then."""
    judged: dict[int, Judgement] = {}

    def seen(attempt: Attempt, preparation: Any, result: Any, crew: Any) -> Judgement:
        judged[result.steps] = evaluate(attempt, preparation, result, crew)
        return judged[result.steps]

    monkeypatch.setattr(evaluation_stage, "evaluate", seen)
    gates = [{"metric": "task/exactMatch", "atLeast": 0.9}, {"metric": "test/loss", "atMost": 100.0}]
    with pytest.raises(JobError, match="1 of 2 gates passed"):
        run_job(job("baseline", gates=gates, onGateFailure="tryEarlierCheckpoint"), inputs, monkeypatch)
    assert sorted(judged) == [4, 6, 8]
    (inputs / "claims" / "job" / "out").rename(inputs / "claims" / "job" / "alone")

    monkeypatch.setattr(evaluation_stage, "evaluate", evaluate)
    done = run_job(job(), inputs, monkeypatch, attempt=2)
    found = compared(done)
    assert list(found) == ["step-4", "step-6"]
    assert done.report.evaluation is not None
    assert done.report.evaluation.candidate == 8
    last = {result.metric: result for result in done.report.evaluation.results}
    for step in (4, 6):
        alone = {result.metric: result.value for result in judged[step].evaluation.results}
        assert {metric: value for metric, (value, _) in found[f"step-{step}"].items()} == alone
        assert {"validation/loss", "test/loss", "task/loss", "task/f1", "retention/loss", "train/gap"} <= alone.keys()
        assert alone["task/loss"] != last["task/loss"].value
        for metric, (value, difference) in found[f"step-{step}"].items():
            assert difference is not None
            assert difference.value == pytest.approx(last[metric].value - value, abs=1e-9)
        _, paired = found[f"step-{step}"]["task/loss"]
        assert paired is not None
        assert paired.low < paired.value < paired.high  # type: ignore[operator]
    report = next((inputs / "claims" / "job" / "out").rglob("report.md")).read_text()
    assert "## Beside earlier checkpoints\n" in report
    assert "| `task/loss` | `step-4` |" in report
    assert "## Beside other jobs" not in report


@pytest.mark.parametrize("gone", [False, True], ids=["damaged", "gone"])
def test_one_that_cannot_be_read_is_passed_over_and_named(gone: bool, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is lost after the training, before anybody is asked: the model of the last step is published, and is beside the other one."""

    def lost_before(*given: Any) -> Judgement:
        file = checkpoint_file(inputs, 4)
        content = file.read_bytes()
        file.unlink()
        if not gone:
            file.write_bytes(content[:-1])
        return evaluate(*given)

    monkeypatch.setattr(evaluation_stage, "evaluate", lost_before)
    done = run_job(job(), inputs, monkeypatch)
    assert list(compared(done)) == ["step-6"]
    assert "the checkpoint of step 4 is damaged: it is not among the results" in done.report.warnings
    assert [artifact.kind for artifact in done.report.artifacts] == ["adapter"]


def test_where_all_are_lost_the_results_stand_alone(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost_before(*given: Any) -> Judgement:
        for step in (4, 6):
            checkpoint_file(inputs, step).unlink()
        return evaluate(*given)

    monkeypatch.setattr(evaluation_stage, "evaluate", lost_before)
    done = run_job(job(), inputs, monkeypatch)
    assert compared(done) == {}
    assert len([text for text in done.report.warnings if "is damaged: it is not among the results" in text]) == 2
    assert done.report.artifacts


def test_no_more_are_asked_than_there_is_room_for(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one with the lowest validation loss is; its place is the next one's where it cannot be read."""
    monkeypatch.setattr(evaluation_stage, "COMPARED_MAX", 1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "publish", killed)
        with pytest.raises(KilledError):
            run_job(job(), inputs, patch)
    held_out = json.loads((own_folder(inputs) / "history.json").read_text())["heldOut"]["points"]
    losses = {point["step"]: point["validation/loss"] for point in held_out}
    best, other = sorted((4, 6), key=losses.__getitem__)
    assert {path.name for path in (own_folder(inputs) / "answers").iterdir()} == {"baseline", "step-8", f"step-{best}"}
    checkpoint_file(inputs, best).unlink()
    shutil.rmtree(own_folder(inputs) / "answers" / f"step-{best}")
    assert list(compared(run_job(job(), inputs, monkeypatch, attempt=2))) == [f"step-{other}"]


def test_a_head_that_is_killed_asks_nobody_twice(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each suite that anybody has answered, and before it publishes."""
    asked: list[str] = []
    answered, complete = answering._Suite._answered, answering._Suite._complete

    def counted(self: answering._Suite, cases: Any) -> Any:
        asked.extend(f"{self._candidate} {self._questions.suite} {case.id}" for case in cases)
        return answered(self, cases)

    def once(self: answering._Suite, cases: Any) -> None:
        complete(self, cases)
        raise KilledError

    monkeypatch.setattr(answering._Suite, "_answered", counted)
    attempts = 0
    with monkeypatch.context() as patch:
        patch.setattr(answering._Suite, "_complete", once)
        patch.setattr(run, "publish", killed)
        while len(set(asked)) < 4 * (12 + 8):  # baseline and three checkpoints, each with both suites
            attempts += 1
            with pytest.raises(KilledError):
                run_job(job(), inputs, patch, attempt=attempts)
    assert attempts == 8
    assert len(asked) == len(set(asked))
    monkeypatch.setattr(worker_group, "_train_on_worker", killed)
    monkeypatch.setattr(worker_group, "_answer_on_worker", killed)
    assert list(compared(run_job(job(), inputs, monkeypatch, attempt=attempts + 1))) == ["step-4", "step-6"]


def killed(*_: Any, **__: Any) -> None:
    raise KilledError
