"""The whole loop where something is lost or damaged on the way: what is done again is what has to be, and nothing is stuck."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.in_process import KilledError, run_job
from tests.tiny_llama import write_questions
from tests.unit.trainer_run.looped_job import make_inputs, own_folder
from tests.unit.trainer_run.test_answering import CASES, QUESTIONS, SOMEBODY, Parrot
from tests.unit.trainer_run.test_loop import storage_in
from tests.unit.trainer_run.test_whole_loop import SUITES, a_job

from finetune_api.reasons import Reason
from finetune_trainer import evaluation_stage, worker_group
from finetune_trainer.answering import Asking, Candidate, answer, read_answers, write_cases
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation_stage import Judgement
from finetune_trainer.failures import as_job_error
from finetune_trainer.measuring import by_weights
from finetune_trainer.report import Reporter
from finetune_trainer.worker import Worker

SHORT = {"epochs": 2, "globalBatchSize": 12, "maxSequenceLength": 64, "learningRate": 0.02, "precision": "float32", "packing": False}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return make_inputs(tmp_path)


def damage(inputs: Path, step: int) -> None:
    file = own_folder(inputs) / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many workers are wanted, each time that this changes."""
    wanted: list[int] = []
    announce = Reporter.announce

    def seen(self: Reporter, **changes: Any) -> None:
        announce(self, **changes)
        if not wanted or self.report.workers_wanted != wanted[-1]:
            wanted.append(self.report.workers_wanted)

    monkeypatch.setattr(Reporter, "announce", seen)
    return wanted


def test_the_workers_that_have_trained_are_kept_to_be_asked(inputs: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    gates = [{"metric": "train/gap", "maxIncrease": 100.0, "over": "baseline"}]
    report = run_job(a_job("job", training=SHORT, evaluation={"suites": SUITES, "gates": gates}), inputs, monkeypatch).report
    assert wanted == [0, 1, 0]
    assert report.evaluation is not None
    assert report.evaluation.gates_verdict == "Passed"  # the untuned model has a gap too: to the loss that the training begins with


def test_a_damaged_earlier_checkpoint_is_passed_over_for_the_next(inputs: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate on the test loss is judged of every checkpoint, since that loss is measured of each; the workers stay till the end."""
    judged: list[int] = []
    evaluate = evaluation_stage.evaluate

    def seen(attempt: Any, preparation: Any, result: Any, crew: Any) -> Judgement:
        judged.append(result.steps)
        if len(judged) == 2:
            damage(inputs, result.steps)
        judgement = evaluate(attempt, preparation, result, crew)
        if len(judged) > 1:
            return judgement
        gates = tuple(gate.model_copy(update={"verdict": "Failed"}) for gate in judgement.evaluation.gates)
        return Judgement(judgement.evaluation.model_copy(update={"gates": gates}), judgement.samples, judgement.course)

    monkeypatch.setattr(evaluation_stage, "evaluate", seen)
    plan = {"suites": SUITES, "gates": [{"metric": "test/loss", "atMost": 100.0}], "onGateFailure": "tryEarlierCheckpoint"}
    data = {part: {"source": f"pvc://data/{part}.jsonl"} for part in ("train", "validation", "test")}
    job = a_job("job", data=data, training=SHORT, evaluation=plan, checkpoint={"everySteps": 2, "keep": 4})
    report = run_job(job, inputs, monkeypatch).report
    assert len(judged) == 3
    assert wanted == [0, 1, 0]
    assert report.evaluation is not None
    assert report.evaluation.candidate == judged[-1]
    assert report.evaluation.gates_verdict == "Passed"


def test_a_result_whose_checkpoint_is_damaged_is_trained_again(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_job("job", training=SHORT, evaluation={"suites": SUITES}, checkpoint={"everySteps": 2, "keep": 2})
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_stage, "evaluate", killed)
        with pytest.raises(KilledError):
            run_job(job, inputs, patch, attempt=1)
    damage(inputs, 8)
    with pytest.raises(JobError) as raised:
        run_job(job, inputs, monkeypatch, attempt=2)
    assert as_job_error(raised.value).reason == Reason.CHECKPOINT_CORRUPTED
    report = run_job(job, inputs, monkeypatch, attempt=3).report
    assert report.resumed_step == 6
    assert report.artifacts


def test_a_job_that_keeps_no_weights_comes_to_the_same_end_without_workers(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gates = [{"metric": "task/exactMatch", "atLeast": 0.9}]
    job = a_job("job", training=SHORT, evaluation={"suites": SUITES, "gates": gates, "onGateFailure": "fail"})
    for attempt in (1, 2):
        with pytest.raises(JobError, match="0 of 1 gates passed") as raised:
            run_job(job, inputs, monkeypatch, attempt=attempt)
        assert raised.value.reason == Reason.GATES_NOT_PASSED
        assert not list(own_folder(inputs).glob("*/adapter"))
        monkeypatch.setattr(worker_group, "_train_on_worker", killed)
        monkeypatch.setattr(worker_group, "_answer_on_worker", killed)


def test_another_model_that_is_not_there_is_said_before_a_worker_is_asked(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"name": "same", "source": "pvc://data/model"}, {"name": "none", "source": "pvc://data/nothing"}]
    job = a_job("job", training=SHORT, evaluation={"suites": SUITES}, baseline={"models": models})
    monkeypatch.setattr(worker_group, "_answer_on_worker", killed)
    with pytest.raises(JobError, match=r"baseline\.models\[1\]: .*nothing") as raised:
        run_job(job, inputs, monkeypatch)
    assert raised.value.reason == Reason.MODEL_NOT_FOUND


def test_answers_to_data_that_is_gone_are_not_taken_for_answers_to_other_data(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two attempts the prepared data is lost, and the file that it was made from is another one."""
    job = a_job("job", training=SHORT, evaluation={"suites": SUITES}, baseline={"prompts": [{"name": "plain"}]})
    with monkeypatch.context() as patch:
        patch.setattr(worker_group, "_train_on_worker", killed)
        with pytest.raises(KilledError):
            run_job(job, inputs, patch, attempt=1)
    answers = own_folder(inputs) / "answers" / "baseline" / "task.jsonl"
    before = answers.read_text()
    shutil.rmtree(own_folder(inputs).parent / "cache")
    write_questions(inputs / "claims" / "data" / "validation.jsonl", 12, start=300)
    run_job(job, inputs, monkeypatch, attempt=2)
    assert answers.read_text() != before


def killed(*_: Any, **__: Any) -> None:
    raise KilledError


def test_two_groups_that_ask_the_same_do_not_take_each_others_answers_away(tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    write_cases(storage, QUESTIONS.file, CASES)

    class Second(Parrot):
        def finish(self) -> None:
            answer(Asking(Parrot(), "completion"), SOMEBODY, storage, Worker(), lambda _: None)  # type: ignore[arg-type]

    answer(Asking(Second(), "completion"), SOMEBODY, storage, Worker(), lambda _: None)  # type: ignore[arg-type]
    assert read_answers(storage, SOMEBODY.name, QUESTIONS) is not None


def test_a_model_is_loaded_once_for_all_that_it_is_asked() -> None:
    other = {"source": "hf://a/b"}
    asked = [Candidate("baseline"), Candidate("model-a", model=other), Candidate("prompt-x"), Candidate("model-a.x", model=other)]
    assert [each.name for each in by_weights(asked)] == ["baseline", "prompt-x", "model-a", "model-a.x"]
