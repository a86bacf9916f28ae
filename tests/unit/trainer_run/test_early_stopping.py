"""Early stopping and the best checkpoint: what is published, whatever happens on the way."""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import CONFIG, CPU, DATA, Listener, Together, job_with, result, run, steps_saved, storage_in

from finetune_trainer import loop
from finetune_trainer.errors import JobError
from finetune_trainer.keeping import CHECKPOINTS
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model import load_model
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.objectives import Sft
from finetune_trainer.progress import WorkerProgress
from finetune_trainer.sources import Mounts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = make_tiny_llama(tmp_path_factory.mktemp("model"), width=16)
    return fetch_model(job_with(folder).spec.model, Mounts(folder, local=True), folder / "cache", weights=True)


def worsening_after(monkeypatch: pytest.MonkeyPatch, losses: Iterable[float]) -> None:
    """Have the validation losses be these; the untuned model's and the other splits' are as they are."""
    real, coming = loop.measure, iter(losses)

    def measure(model: Any, objective: Any, splits: Any, *others: Any) -> Any:
        return {"validation": next(coming)} if list(splits) == ["validation"] else real(model, objective, splits, *others)

    monkeypatch.setattr(loop, "measure", measure)


def test_early_stopping_publishes_the_best_checkpoint(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured after steps 3, 6, 9, ...: the loss falls once and then rises; with patience 2 the training ends after step 12."""
    settings = {"epochs": 8, "earlyStopping": {"patience": 2}}
    with monkeypatch.context() as patch:
        worsening_after(patch, [3.0, 2.0, 2.5, 2.6, 2.7])
        listener = Listener()
        assert run(files, tmp_path / "stopped", listener, **settings)
    last = listener.told[-1]
    assert (last.step, last.checkpoint.step if last.checkpoint else None) == (12, 12)
    assert last.best_checkpoint is not None
    assert (last.best_checkpoint.step, last.best_checkpoint.value, last.best_checkpoint.metric) == (6, 2.0, "validation/loss")
    assert steps_saved(tmp_path / "stopped") == ["step-00000006", "step-00000009", "step-00000012"]
    _, weights = result(tmp_path / "stopped")
    best = load_file(tmp_path / "stopped" / CHECKPOINTS / "step-00000006" / "model.safetensors")
    assert sorted(float(tensor.double().sum()) for tensor in weights.values()) == sorted(float(t.double().sum()) for t in best.values())
    assert json.loads((tmp_path / "stopped" / "result" / "manifest.json").read_text())["steps"] == 6


def test_an_interruption_does_not_change_when_it_stops(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"epochs": 8, "earlyStopping": {"patience": 2}}
    worsening_after(monkeypatch, [3.0, 2.0, 2.5, 2.6])
    assert not run(files, tmp_path, Listener(stop_after=7), **settings)
    assert not run(files, tmp_path, Listener(stop_after=2), **settings)  # after step 9, before its measurement
    listener = Listener()
    assert run(files, tmp_path, listener, **settings)
    assert (listener.told[0].start_step, listener.told[-1].step) == (9, 12)
    listener = Listener()
    worsening_after(monkeypatch, [2.6])
    (tmp_path / "result" / "manifest.json").unlink()
    assert run(files, tmp_path, listener, **settings)
    assert listener.asked == 0


def test_without_early_stopping_the_last_is_published_and_the_best_kept(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worsening_after(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    listener = Listener()
    assert run(files, tmp_path, listener, epochs=5)
    assert steps_saved(tmp_path) == ["step-00000003", "step-00000009", "step-00000010"]
    assert listener.told[-1].best_checkpoint is not None
    assert listener.told[-1].best_checkpoint.step == 3
    assert json.loads((tmp_path / "result" / "manifest.json").read_text())["steps"] == 10


def test_a_best_checkpoint_that_is_damaged_is_not_published(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaging(Listener):
        def post(self, progress: WorkerProgress) -> None:
            super().post(progress)
            if progress.step == 10:
                (tmp_path / CHECKPOINTS / "step-00000003" / "model.safetensors").write_bytes(b"lost")

    worsening_after(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    listener = Damaging()
    assert run(files, tmp_path, listener, epochs=5, earlyStopping={"patience": 9})
    assert "the best checkpoint is lost" in listener.told[-1].warnings[0]
    assert json.loads((tmp_path / "result" / "manifest.json").read_text())["steps"] == 10


def test_the_best_checkpoint_is_told_of_with_all_figures(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the last one, so what an objective says beside its loss is not at hand any more."""

    class Shows(Sft):
        figures = ("ones",)

        @property
        def measured(self) -> "Shows":
            return self

        def loss(self, model: Any, batch: Any) -> Any:
            loss = super().loss(model, batch)
            return replace(loss, figures={"ones": torch.tensor(float(loss.count))})

    worsening_after(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: Shows())
    assert run(files, tmp_path, epochs=5, earlyStopping={"patience": 9})
    manifest = json.loads((tmp_path / "result" / "manifest.json").read_text())
    assert manifest["steps"] == 3
    assert manifest["after"].keys() == manifest["before"].keys() == {"validation", "validation/ones", "test", "test/ones"}
    assert manifest["after"]["validation/ones"] == 1.0


class KilledError(BaseException):
    """The process is gone."""


def test_the_last_checkpoint_is_measured_by_the_next_start_where_this_one_was_killed_before(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step, 10, is no multiple of 3: its checkpoint is the best, whether or not the first start came to measure it."""

    def killed() -> Iterator[float]:
        yield from (3.0, 2.0, 1.5)
        raise KilledError

    settings = {"epochs": 5, "earlyStopping": {"patience": 9}}
    with monkeypatch.context() as patch:
        worsening_after(patch, killed())
        with pytest.raises(KilledError):
            run(files, tmp_path, **settings)
    assert steps_saved(tmp_path)[-1] == "step-00000010"
    worsening_after(monkeypatch, [1.0])
    listener = Listener()
    assert run(files, tmp_path, listener, **settings)
    assert listener.asked == 0
    assert json.loads((tmp_path / "result" / "manifest.json").read_text())["steps"] == 10
    assert result(tmp_path)[0]["validation"] == 1.0


def test_every_worker_names_the_last_good_checkpoint(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that has written none: whose error is told first is chance."""

    class BreaksAfterTheThird(Sft):
        calls = 0

        def loss(self, model: Any, batch: Any) -> Any:
            loss = super().loss(model, batch)
            self.calls += model.module.training
            return replace(loss, total=loss.total * float("nan")) if self.calls > 3 else loss

    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: BreaksAfterTheThird())
    job, together = job_with(files.folder, packing=False), Together(2)
    task = Task(job, files.base, CONFIG, storage_in(tmp_path))

    def work(rank: int) -> str:
        with pytest.raises(JobError) as caught:
            train(task, Models(load_model(files, job, CPU)), DATA, together.worker(rank), Listener())
        return caught.value.message

    with ThreadPoolExecutor(2) as pool:
        assert all(message.endswith("step-00000003") for message in pool.map(work, range(2)))
