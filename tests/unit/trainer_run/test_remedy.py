"""What fails on the way is mended, on one worker or several, and no figure is another for it."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sharded import Fails, Run, start
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import CONFIG, CPU, DATA, Listener, Together, job_with, manifest_with, result, run, storage_in

from finetune_api.reasons import Reason
from finetune_trainer import loop
from finetune_trainer.data.shares import Limit
from finetune_trainer.errors import JobError
from finetune_trainer.failures import failure_from
from finetune_trainer.loop import REMEDY, Models, Task, train
from finetune_trainer.model import load_model
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.objectives import Sft
from finetune_trainer.remedy import TRAINING, Notes, Remedy
from finetune_trainer.sources import Mounts
from finetune_trainer.worker import Worker

SETTINGS: dict[str, Any] = {"microBatchSize": 4, "packing": False, "epochs": 1}
HALVED = "a micro-batch did not fit into memory: micro-batches are of {} now; the global batch is as it was"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = make_tiny_llama(tmp_path_factory.mktemp("model"), width=16)
    return fetch_model(job_with(folder).spec.model, Mounts(folder, local=True), folder / "cache", weights=True)


@pytest.fixture(scope="module")
def undisturbed(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(files, folder, dropout=0.0, **SETTINGS)
    return folder


class Short:
    """An objective for which memory is short at some calls, counted from 1, of those in evaluation."""

    unit = "label"

    def __init__(self, *refused: int) -> None:
        self.refused, self.calls, self.rows = refused, 0, list[int]()

    @property
    def measured(self) -> "Short":
        return self

    def loss(self, model: Any, batch: Any) -> Any:
        if not model.module.training:
            self.calls += 1
            if self.calls in self.refused:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            self.rows.append(len(batch.row_documents))
        return Sft().loss(model, batch)


def same(folder: Path, other: Path) -> None:
    (figures, weights), (others, other_weights) = result(folder), result(other)
    assert figures == pytest.approx(others, abs=1e-5)
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("refused", "told"), [((1,), "2 sequences"), ((1, 2), "1 sequence"), ((5,), "2 sequences")])
def test_held_out_data_that_does_not_fit_is_measured_in_halves(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, refused: tuple[int, ...], told: str
) -> None:
    """Before the first step, twice in one split, after a checkpoint. What follows is held in halves from the beginning."""
    short, listener = Short(*refused), Listener()
    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: short)
    assert run(files, tmp_path, listener, dropout=0.0, **SETTINGS)
    same(tmp_path, undisturbed)
    assert listener.told[-1].warnings == (HALVED.format(told),)
    assert max(short.rows[refused[-1] - len(refused) :]) == int(told[0])


def test_one_of_two_workers_is_short_in_an_evaluation(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    """It goes on by itself, with nothing to wait for; the one that leads tells it, and both hold half from then on."""
    objectives, together, listener = [Short(), Short(1)], Together(2), Listener()
    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: objectives[context.worker.rank])
    job = job_with(files.folder, dropout=0.0, **SETTINGS)
    models, task = [load_model(files, job, CPU) for _ in range(2)], Task(job, files.base, CONFIG, storage_in(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(train, task, Models(models[rank]), DATA, together.worker(rank), listener) for rank in range(2)]
        assert [one.result() for one in both] == [True, True]
    same(tmp_path, undisturbed)
    assert listener.told[-1].warnings == (HALVED.format("1 sequence"),)  # of three rows each
    assert max(objectives[0].rows[1:]) == 1


def test_a_row_that_cannot_be_measured_alone_ends_the_job_and_names_what_to_change(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: Short(*range(1, 100)))
    with pytest.raises(
        JobError, match=r"a single sequence does not fit into the memory of a worker: lower training\.maxSequenceLength"
    ) as caught:
        run(files, tmp_path, **SETTINGS)
    failure = failure_from(caught.value, "Train")
    assert (failure.reason, failure.retryable) == (Reason.GPU_OUT_OF_MEMORY, True)
    assert failure.hint is not None
    assert "training.microBatchSize or maxSequenceLength" in failure.hint
    assert "compute.strategy fsdp" in failure.hint


@pytest.mark.parametrize("content", ["[]", "{", '{"most": 2}', '{"uncompiled": ""}', '{"most": 9}'])
def test_notes_that_say_nothing_of_use_change_nothing(files: ModelFiles, tmp_path: Path, content: str) -> None:
    (tmp_path / "notes.json").write_text(content)
    said = list[str]()
    model = load_model(files, job_with(files.folder), CPU)
    remedy = Remedy(TRAINING, model, Limit(4, 100), said.append, Notes(storage_in(tmp_path), "notes.json"))
    remedy.resume(Worker())
    known = content == '{"most": 2}'
    assert (remedy.limit, said) == ((Limit(2, 100), [HALVED.format("2 sequences")]) if known else (Limit(4, 100), []))


# Where each worker holds a part of every layer, the others wait for one that fails: the group ends, and the next one knows.

Told = tuple[dict[int, float], list[str]]
SHARDED: dict[str, Any] = {"globalBatchSize": 4, **SETTINGS, "precision": "float32"}


def sharded(files: ModelFiles, folder: Path, fails: Fails | None = None) -> Told:
    manifest = manifest_with(files.folder, {"lora": {"rank": 2, "dropout": 0.0}}, **SHARDED)
    manifest["spec"]["compute"] = {"strategy": "fsdp"}
    losses, _ = start(Run(manifest, files.folder, folder, 2, fails=fails))
    return losses, json.loads((folder / "told.json").read_text())["warnings"]


@pytest.fixture(scope="module")
def together(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    folder = tmp_path_factory.mktemp("together")
    losses, warnings = sharded(files, folder)
    assert warnings == []
    return folder, losses


def test_where_one_of_them_cannot_compile_none_waits_for_it(
    files: ModelFiles, tmp_path: Path, together: tuple[Path, dict[int, float]]
) -> None:
    """In the midst of the first pass of all: it goes on with the layers as they are, and then all do. Nobody begins anew."""
    manifest = manifest_with(files.folder, {"lora": {"rank": 2, "dropout": 0.0}}, **SHARDED, compile="always")
    manifest["spec"]["compute"] = {"strategy": "fsdp"}
    losses, _ = start(Run(manifest, files.folder, tmp_path, 2, stop_after=2, fails=Fails(0, training=False, at_first=True)))
    assert losses == pytest.approx({step: together[1][step] for step in losses}, abs=1e-5)
    told = json.loads((tmp_path / "told.json").read_text())["warnings"]
    assert told == ["the model is trained without torch.compile: it failed on another worker"]


@pytest.mark.parametrize(
    ("fails", "steps", "warning"),
    [
        (Fails(2, training=False), range(1, 9), HALVED.format("1 sequence")),
        (Fails(5, training=True), range(4, 9), HALVED.format("1 sequence")),
        (Fails(5, training=True, compiled=True), range(4, 9), "the model is trained without torch.compile: no kernel for this shape"),
    ],
    ids=["in the baseline", "in a step", "compiled, in a step"],
)
def test_workers_that_wait_for_one_another_begin_anew_knowing_what_failed(
    files: ModelFiles, tmp_path: Path, together: tuple[Path, dict[int, float]], fails: Fails, steps: range, warning: str
) -> None:
    """As Ray starts them again: an error that is not final, and the next start goes on from the checkpoint after step 3."""
    with pytest.raises(torch.multiprocessing.ProcessRaisedException):
        sharded(files, tmp_path, fails)
    assert json.loads((tmp_path / "ended-1.json").read_text()) == [Reason.WORKERS_LOST, False]
    assert (tmp_path / REMEDY).exists()
    again = Fails(0, training=True, compiled=True) if fails.compiled else None  # the layers are compiled anew, and do not fail
    losses, warnings = sharded(files, tmp_path, again)
    folder, expected = together
    assert losses == pytest.approx({step: expected[step] for step in steps}, abs=1e-5)
    assert warnings == [warning]
    same(tmp_path, folder)
