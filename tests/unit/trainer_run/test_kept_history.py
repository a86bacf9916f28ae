"""The loop keeps the course of its losses, and a training that was killed leaves the one that an undisturbed one leaves."""

from pathlib import Path

import pytest
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import CHECKPOINTS, Listener, job_with, result, run, storage_in

from finetune_trainer.evaluation.history import HISTORY, read_history
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.sources import Mounts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = make_tiny_llama(tmp_path_factory.mktemp("model"), width=16)
    return fetch_model(job_with(folder).spec.model, Mounts(folder, local=True), folder / "cache", weights=True)


def test_every_step_and_every_validation_stands_in_it(files: ModelFiles, tmp_path: Path) -> None:
    listener = Listener()
    assert run(files, tmp_path, listener)
    course = read_history(storage_in(tmp_path))
    assert [point.step for point in course.train] == list(range(1, 9))
    assert all(set(point.values) == {"train/loss", "train/learningRate", "train/gradNorm"} for point in course.train)
    told = {metric.step: metric.value for progress in listener.told for metric in progress.metrics if metric.name == "train/loss"}
    assert {point.step: point.values["train/loss"] for point in course.train} == told
    # Validation before the first step, at each checkpoint (every third step) and at the end.
    assert [point.step for point in course.held_out] == [0, 3, 6, 8]
    figures, _ = result(tmp_path)
    assert course.held_out[0].values == {"validation/loss": figures["before validation"]}
    assert course.held_out[-1].values == {"validation/loss": figures["validation"]}


@pytest.mark.parametrize("lost", [None, "step-00000005"])
def test_an_interrupted_training_leaves_the_same(files: ModelFiles, tmp_path: Path, lost: str | None) -> None:
    """Stopped after step 5, it goes on from there; where that checkpoint is damaged, from the one of step 3."""
    assert run(files, tmp_path / "undisturbed")
    assert not run(files, tmp_path / "stopped", Listener(stop_after=5))
    if lost:
        (tmp_path / "stopped" / CHECKPOINTS / lost / "model.safetensors").write_bytes(b"cut off")
    assert run(files, tmp_path / "stopped")
    assert (tmp_path / "stopped" / HISTORY).read_text() == (tmp_path / "undisturbed" / HISTORY).read_text()
