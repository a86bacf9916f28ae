"""Jobs on real Ray, two workers, CPU: to the end, and to the same end when processes die on the way."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.integration.trainer.harness import Pods
from tests.tiny_llama import make_tiny_llama, write_questions
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.report import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SUCCEEDED, Report

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

STEPS = 120
"""60 examples in batches of 12, 24 epochs."""
KILL_AT = 20
SAVED_EVERY = 10
SAVED_ONCE = 60
"""So far from both ends that a kill after step 62 is done before the next save, however late a report is."""
LOST_AT_LEAST = 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_llama(folder / "model")
    write_questions(folder / "train.jsonl", 60)
    write_questions(folder / "validation.jsonl", 10, start=100)
    write_questions(folder / "test.jsonl", 10, start=200)
    return folder


def spec(inputs: Path, output: Path, *, workers: int = 2, every_steps: int = SAVED_EVERY) -> dict[str, Any]:
    return {
        "model": {"source": f"file://{inputs}/model"},
        "data": {name: {"source": f"file://{inputs}/{name}.jsonl"} for name in ("train", "validation", "test")},
        "method": {"lora": {"rank": 4}},
        "training": {
            "epochs": 24,
            "globalBatchSize": 12,
            "microBatchSize": 1,
            "maxSequenceLength": 64,
            "packing": False,
            "learningRate": 0.002,
            "precision": "float32",
        },
        "checkpoint": {"everySteps": every_steps},
        "compute": {"workers": {"min": workers, "max": workers}},
        "output": {"storage": f"file://{output}"},
    }


def losses(report: Report) -> dict[str, float]:
    """Every figure that must not depend on what happened on the way."""
    assert report.evaluation is not None
    figures = {f"{result.metric} before": result.baseline for result in report.evaluation.results}
    figures |= {f"{result.metric} after": result.value for result in report.evaluation.results}
    figures |= {metric.name: metric.value for metric in report.metrics if metric.name == "train/loss"}
    assert all(value is not None for value in figures.values())
    return figures  # type: ignore[return-value]


def has_step(step: int) -> Any:
    return lambda report: report.progress is not None and report.progress.step >= step


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pods, Report]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with Pods(folder / "pods", spec(inputs, folder / "out")) as pods:
        pods.start_head()
        pods.follow(has_step(1))
        assert "finetune_training_steps_planned 120.0" in pods.read("/metrics")
        assert pods.read("/healthz") == "ok\n"
        assert pods.read_report(token="another") is None
        code, report = pods.ended()
        assert (code, report.outcome) == (EXIT_SUCCEEDED, "Succeeded"), pods.log()
        yield pods, report


def test_a_job_goes_all_the_way(undisturbed: tuple[Pods, Report]) -> None:
    pods, report = undisturbed
    assert [stage.state for stage in report.stages] == ["Succeeded"] * 4
    running = [next((stage.name for stage in seen.stages if stage.state == "Running"), None) for seen in pods.reports]
    wanted = {stage: {seen.workers_wanted for seen, name in zip(pods.reports, running, strict=True) if name == stage} for stage in running}
    assert wanted["Train"] == {2}
    assert wanted.get("Prepare", {0}) == wanted.get("Publish", {0}) == {0}
    assert report.progress is not None
    assert (report.progress.step, report.progress.total_steps, report.progress.epoch) == (STEPS, STEPS, 24)
    assert report.data is not None
    assert (report.data.train, report.data.validation, report.data.test) == (60, 10, 10)
    assert (report.lost_steps, report.resumed_step) == (0, None)
    figures = losses(report)
    assert figures["validation/loss after"] < figures["validation/loss before"] - 0.2
    assert figures["test/loss after"] < figures["test/loss before"] - 0.2


def test_the_adapter_is_what_peft_loads(inputs: Path, undisturbed: tuple[Pods, Report]) -> None:
    """The validation loss, worked out with nothing but transformers and peft, is the one in the report."""
    _, report = undisturbed
    folder = report.artifacts[0].uri.removeprefix("file://")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs / "model"), folder).eval()
    total = count = 0.0
    for line in (inputs / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*([tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []), *prompt, *completion]])
        labels = ids.clone()
        labels[0, : -len(completion)] = -100
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * len(completion)
        count += len(completion)
    assert total / count == pytest.approx(losses(report)["validation/loss after"], abs=1e-4)
    card = Path(folder, "README.md").read_text()
    assert 'library_name: "peft"' in card
    assert f"{losses(report)['test/loss after']:.4f}" in card


def begins_with_bos(tokenizer: Any) -> bool:
    return bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def test_a_worker_process_that_is_killed_costs_no_accuracy(inputs: Path, tmp_path: Path, undisturbed: tuple[Pods, Report]) -> None:
    with Pods(tmp_path / "pods", spec(inputs, tmp_path / "out", every_steps=SAVED_ONCE)) as pods:
        pods.start_head()
        at = pods.follow(has_step(SAVED_ONCE + LOST_AT_LEAST))
        assert at is not None
        victims = pods.training_processes()
        assert len(victims) == 2
        os.kill(victims[1], signal.SIGKILL)
        code, report = pods.ended()
    assert code == EXIT_SUCCEEDED
    assert report.attempt == 1
    assert LOST_AT_LEAST <= report.lost_steps < STEPS
    assert report.resumed_step is None
    assert losses(report) == pytest.approx(losses(undisturbed[1]), abs=1e-5)


def test_a_head_that_is_killed_then_one_that_is_stopped_cost_no_accuracy(
    inputs: Path, tmp_path: Path, undisturbed: tuple[Pods, Report]
) -> None:
    with Pods(tmp_path / "pods", spec(inputs, tmp_path / "out")) as pods:
        pods.start_head()
        assert pods.follow(has_step(KILL_AT)) is not None
        pods.kill_head()
        pods.stop_workers()

        pods.start_head()
        going_on = pods.follow(has_step(KILL_AT + SAVED_EVERY + 5))
        assert going_on is not None
        assert going_on.resumed_step is not None
        assert going_on.resumed_step % SAVED_EVERY == 0
        assert going_on.resumed_step >= KILL_AT - SAVED_EVERY
        pods.terminate_head()
        code, stopped = pods.ended()
        assert (code, stopped.outcome) == (EXIT_INTERRUPTED, "Interrupted")
        assert stopped.progress is not None
        assert stopped.checkpoints is not None
        assert stopped.checkpoints.latest is not None
        assert stopped.progress.step < STEPS
        assert stopped.progress.step - stopped.checkpoints.latest.step <= 1

        pods.start_head()
        code, report = pods.ended()
    assert code == EXIT_SUCCEEDED
    assert report.resumed_step == stopped.checkpoints.latest.step
    assert report.lost_steps == 0
    assert losses(report) == pytest.approx(losses(undisturbed[1]), abs=1e-5)


LONG = {"epochs": 100, "microBatchSize": 2}
"""500 steps."""


@pytest.fixture(scope="module")
def left_by_a_worker(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Report, str]:
    """A long training, one of whose worker pods has to go: exit code, last word, log."""
    folder = tmp_path_factory.mktemp("left")
    job = spec(inputs, folder / "out", every_steps=1000)
    job["training"] |= LONG
    with Pods(folder / "pods", job) as pods:
        pods.start_head()
        assert pods.follow(has_step(KILL_AT)) is not None
        left = pods.terminate_worker()
        assert left is not None, "the training came to its end before the worker went"
        return *pods.ended(), pods.log()


def test_a_worker_pod_that_has_to_go_costs_no_step(left_by_a_worker: tuple[int, Report, str]) -> None:
    code, report, log = left_by_a_worker
    assert "a worker is taken away" in log
    assert code == EXIT_SUCCEEDED
    assert (report.attempt, report.lost_steps) == (1, 0)
    assert report.progress is not None
    assert report.progress.step == 500


def test_an_elastic_job_grows_and_shrinks_and_comes_to_the_same_end(
    inputs: Path, tmp_path: Path, left_by_a_worker: tuple[int, Report, str]
) -> None:
    """There is room for one worker, then for two, then one is killed and does not come back."""
    job = spec(inputs, tmp_path / "out", every_steps=25)
    job["training"] |= LONG
    job["compute"] = {"workers": {"min": 1, "max": 2}}
    with Pods(tmp_path / "pods", job) as pods:
        pods.room = 1
        pods.start_head()
        assert pods.follow(has_step(1)) is not None
        assert len(pods.training_processes()) == 1
        pods.room = 2
        grown = pods.follow(lambda _: len(pods.training_processes()) == 2)
        assert grown is not None, "the training came to its end before the second worker took part"
        step = grown.progress.step if grown.progress else 0
        shrinking = pods.follow(has_step(step + 25))
        assert shrinking is not None
        assert shrinking.lost_steps == 0
        pods.room = 1
        pods.kill_worker()
        code, report = pods.ended()
        log = (pods.folder / "1-head.log").read_text()
    assert code == EXIT_SUCCEEDED, log
    assert "more workers have joined" in log
    assert "processes that take part: 1, before 2" in log
    assert (report.attempt, report.resumed_step) == (1, None)
    assert report.lost_steps <= 25 + LOST_AT_LEAST
    assert losses(report) == pytest.approx(losses(left_by_a_worker[1]), rel=1e-4)


def test_the_number_of_workers_does_not_matter(inputs: Path, tmp_path: Path, undisturbed: tuple[Pods, Report]) -> None:
    with Pods(tmp_path / "pods", spec(inputs, tmp_path / "out", workers=1)) as pods:
        pods.start_head()
        code, report = pods.ended()
    assert code == EXIT_SUCCEEDED
    assert losses(report) == pytest.approx(losses(undisturbed[1]), abs=1e-4)


def test_a_stop_before_there_is_anything_to_save_ends_the_head_at_once(inputs: Path, tmp_path: Path) -> None:
    with Pods(tmp_path / "pods", spec(inputs, tmp_path / "out")) as pods:
        pods.start_head()
        assert pods.follow(lambda report: report.workers_wanted == 2) is not None
        pods.terminate_head()
        code, report = pods.ended()
    assert (code, report.outcome, report.checkpoints, report.failure) == (EXIT_INTERRUPTED, "Interrupted", None, None)


def test_bad_data_costs_no_worker(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion"\n')
    job = spec(inputs, tmp_path / "out")
    job["data"]["train"] = {"source": f"file://{tmp_path}/train.jsonl"}
    with Pods(tmp_path / "pods", job) as pods:
        pods.start_head()
        code, report = pods.ended()
        assert code == EXIT_FAILED
        assert report.failure is not None
        assert (report.failure.stage, report.failure.reason, report.failure.retryable) == ("Prepare", "DatasetInvalid", False)
        assert "train.jsonl" in report.failure.message
        assert "2" in report.failure.message
        assert {seen.workers_wanted for seen in pods.reports} <= {0}


def test_an_error_that_starting_again_cannot_mend_is_not_tried_again(inputs: Path, tmp_path: Path) -> None:
    """Weights that are no numbers are found by the workers. Ray Train would start them four times."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    make_tiny_llama(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    job = spec(inputs, tmp_path / "out")
    job["model"] = {"source": f"file://{tmp_path}/model"}
    with Pods(tmp_path / "pods", job) as pods:
        pods.start_head()
        code, report = pods.ended()
    assert code == EXIT_FAILED
    assert report.failure is not None
    assert (report.failure.stage, report.failure.reason) == ("Train", "ModelInvalid")
    assert "the untuned model's validation loss is nan" in report.failure.message
