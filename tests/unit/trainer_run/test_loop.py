"""The loop in one process, without Ray: it learns, resumes exactly, stops when asked, and says so when it diverges."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from tests.tiny_llama import make_tiny_llama
from transformers import AutoModelForCausalLM

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer import loop
from finetune_trainer.data.examples import Examples, Prepared, join
from finetune_trainer.data.shares import Limit
from finetune_trainer.errors import JobError
from finetune_trainer.keeping import CHECKPOINTS
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model import load_model
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.objectives import Sft
from finetune_trainer.progress import WorkerProgress
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

CONFIG = {"data": {"digest": "sha256:1"}}
CPU = torch.device("cpu")


class Listener:
    """Remembers what it is told; asks for a stop after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.told: list[WorkerProgress] = []
        self.stop_after = stop_after
        self.asked = 0

    @property
    def stop_requested(self) -> bool:
        self.asked += 1
        return self.stop_after is not None and self.asked >= self.stop_after

    regroup_requested = False

    def post(self, progress: WorkerProgress) -> None:
        self.told.append(progress)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = make_tiny_llama(tmp_path_factory.mktemp("model"), width=16)
    job = job_with(folder)
    return fetch_model(job.spec.model, Mounts(folder, local=True), folder / "cache", weights=True)


def job_with(model: Path, *, dropout: float = 0.2, **training: Any) -> FineTuneJob:
    return parse_job(manifest_with(model, {"lora": {"rank": 2, "dropout": dropout}}, **training), local=True)


def manifest_with(model: Path, method: dict[str, Any], **training: Any) -> dict[str, Any]:
    given = {"epochs": 4, "globalBatchSize": 4, "microBatchSize": 2, "maxSequenceLength": 32, "learningRate": 0.01, "precision": "float32"}
    spec = {
        "model": {"source": f"file://{model}"},
        "data": {"train": {"source": "file:///unused.jsonl"}},
        "method": method,
        "training": {**given, **training},
        "checkpoint": {"everySteps": 3, "keep": 2},
        "output": {"storage": "file:///unused"},
    }
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "a", "uid": "u"}, "spec": spec}


def examples(count: int, seed: int) -> Examples:
    """Rows of 5 to 12 letters; all but the first three count."""
    random = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(count):
        length = int(torch.randint(5, 13, (1,), generator=random))
        tokens = torch.randint(70, 90, (length,), generator=random).int().numpy()
        parts.append((tokens, torch.arange(length).ge(3).numpy()))
    return join(parts)


DATA = Prepared(train=examples(30, 1), validation=examples(6, 2), test=examples(5, 3), rejected=0, digest="sha256:1")


def storage_in(folder: Path) -> Storage:
    return Storage(LocalFileSystem(), str(folder), f"file://{folder}")


def run(files: ModelFiles, folder: Path, listener: Listener | None = None, *, worker: Worker | None = None, **training: Any) -> bool:
    job = job_with(files.folder, **training)
    task = Task(job, files.base, CONFIG, storage_in(folder))
    return train(task, Models(load_model(files, job, CPU)), DATA, worker or Worker(), listener or Listener())


def result(folder: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    manifest = json.loads((folder / "result" / "manifest.json").read_text())
    figures = {**{f"before {split}": loss for split, loss in manifest["before"].items()}, **manifest["after"]}
    return figures, load_file(folder / "result" / "adapter" / "adapter_model.safetensors")


def steps_saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / CHECKPOINTS).iterdir())


def test_it_learns_and_leaves_the_result(files: ModelFiles, tmp_path: Path) -> None:
    listener = Listener()
    assert run(files, tmp_path, listener)
    figures, adapter = result(tmp_path)
    assert figures["validation"] < figures["before validation"]
    assert figures["test"] < figures["before test"]
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())
    last = listener.told[-1]
    assert (last.stage, last.step, last.total_steps, last.epoch) == ("Evaluate", last.total_steps, last.total_steps, 4.0)
    assert last.trained_tokens == 4 * len(DATA.train.tokens)
    assert {metric.name for metric in last.metrics} == {"train/loss", "train/learningRate", "train/gradNorm", "validation/loss"}
    assert last.checkpoint is not None
    assert last.checkpoint.step == last.total_steps
    assert steps_saved(tmp_path)[-2:] == ["step-00000006", "step-00000008"]


def test_the_baseline_is_the_loss_of_the_model_as_it_came(files: ModelFiles, tmp_path: Path) -> None:
    """Worked out with transformers alone, one example at a time."""
    run(files, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(files.folder).eval()
    total = count = 0.0
    for index in range(len(DATA.validation)):
        tokens, labelled = DATA.validation.example(index)
        ids = torch.tensor(tokens.astype("int64"))[None]
        labels = torch.where(torch.tensor(labelled), ids, -100)
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * int(labelled.sum())
        count += int(labelled.sum())
    assert result(tmp_path)[0]["before validation"] == pytest.approx(total / count, abs=1e-5)


def test_a_stop_costs_no_step_and_the_end_is_the_same_to_the_bit(files: ModelFiles, tmp_path: Path) -> None:
    assert run(files, tmp_path / "undisturbed")
    assert not run(files, tmp_path / "stopped", Listener(stop_after=5))
    assert steps_saved(tmp_path / "stopped") == ["step-00000003", "step-00000005"]
    listener = Listener()
    assert run(files, tmp_path / "stopped", listener)
    assert listener.told[0].start_step == 5
    same_end(tmp_path / "undisturbed", tmp_path / "stopped")


def test_what_was_done_after_the_last_checkpoint_is_done_again(files: ModelFiles, tmp_path: Path) -> None:
    """Killed at step 5 means: the checkpoint of step 3 is the newest."""
    assert run(files, tmp_path / "undisturbed")
    assert not run(files, tmp_path / "killed", Listener(stop_after=5))
    (tmp_path / "killed" / CHECKPOINTS / "step-00000005" / "model.safetensors").write_bytes(b"cut off")
    listener = Listener()
    assert run(files, tmp_path / "killed", listener)
    assert listener.told[0].start_step == 3
    same_end(tmp_path / "undisturbed", tmp_path / "killed")


def test_killed_after_the_last_step_only_what_is_missing_is_done(files: ModelFiles, tmp_path: Path) -> None:
    assert run(files, tmp_path)
    before = result(tmp_path)
    (tmp_path / "result" / "manifest.json").unlink()
    listener = Listener()
    assert run(files, tmp_path, listener)
    assert listener.asked == 0
    assert result(tmp_path)[0] == before[0]


def same_end(one: Path, other: Path) -> None:
    (figures, weights), (other_figures, other_weights) = result(one), result(other)
    assert other_figures == figures
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_micro_batches_do_not_change_the_result(files: ModelFiles, tmp_path: Path) -> None:
    for size in (1, 4):
        assert run(files, tmp_path / str(size), microBatchSize=size, dropout=0.0, epochs=2)
    (one, _), (four, _) = result(tmp_path / "1"), result(tmp_path / "4")
    assert one == pytest.approx(four, abs=1e-5)


class Together:
    """Two workers as two threads: all-reduce by a barrier."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world, timeout=60)
        self._tensors: list[torch.Tensor | None] = [None] * world

    def worker(self, rank: int) -> Worker:
        def all_reduce(tensor: torch.Tensor) -> None:
            self._tensors[rank] = tensor.clone()
            self._barrier.wait()
            total = sum(other for other in self._tensors if other is not None)
            self._barrier.wait()
            assert isinstance(total, torch.Tensor)
            tensor.copy_(total)

        return Worker(rank=rank, world=len(self._tensors), all_reduce=all_reduce)


@pytest.mark.parametrize("batch", [4, 1], ids=["a share for each", "fewer rows than workers"])
def test_two_workers_come_to_what_one_does(files: ModelFiles, tmp_path: Path, batch: int) -> None:
    job = job_with(files.folder, dropout=0.0, globalBatchSize=batch, epochs=2)
    data = replace(DATA, train=DATA.train.take(range(8)))
    assert train(
        Task(job, files.base, CONFIG, storage_in(tmp_path / "one")), Models(load_model(files, job, CPU)), data, Worker(), Listener()
    )

    together, task = Together(2), Task(job, files.base, CONFIG, storage_in(tmp_path / "two"))
    models = [load_model(files, job, CPU) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(train, task, Models(model), data, together.worker(rank), Listener()) for rank, model in enumerate(models)]
        assert [one.result() for one in both] == [True, True]

    (one, weights), (two, other) = result(tmp_path / "one"), result(tmp_path / "two")
    assert two == pytest.approx(one, abs=1e-5)
    for name in weights:
        torch.testing.assert_close(other[name], weights[name], atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_no_number_ends_it_with_the_step(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class BreaksAtTheFourth:
        unit = "label"
        measured = Sft()

        def loss(self, model: Any, batch: Any) -> Any:
            loss = real.loss(model, batch)
            if model.module.training:
                taken.append(1)
            return replace(loss, total=loss.total * float("nan")) if len(taken) == 4 else loss

    real = Sft()
    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: BreaksAtTheFourth())
    with pytest.raises(JobError, match=r"step 4: the loss is nan, .*; the last good checkpoint is file://.*/step-00000003$") as caught:
        run(files, tmp_path, microBatchSize=4)
    assert caught.value.reason == Reason.TRAINING_DIVERGED
    assert steps_saved(tmp_path) == ["step-00000003"]


def test_a_validation_loss_that_is_no_number_ends_it_with_the_step(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BreaksOutOfTraining:
        unit = "label"

        @property
        def measured(self) -> Any:
            return self

        def loss(self, model: Any, batch: Any) -> Any:
            loss = real.loss(model, batch)
            trained.append(model.module.training)
            return replace(loss, total=loss.total * float("inf")) if any(trained) and not trained[-1] else loss

    trained: list[bool] = []
    real = Sft()
    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: BreaksOutOfTraining())
    with pytest.raises(JobError, match="step 3: the validation loss is inf") as caught:
        run(files, tmp_path)
    assert caught.value.reason == Reason.TRAINING_DIVERGED


def test_a_preemption_saves_a_checkpoint_and_the_workers_leave(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PREEMPTION_SECONDS", 0.0)
    answers = iter([False, False, False, True])
    assert not run(files, tmp_path, worker=Worker(preempted=lambda: next(answers)))
    assert steps_saved(tmp_path) == ["step-00000003", "step-00000004"]


def test_damaged_checkpoints_are_told(files: ModelFiles, tmp_path: Path) -> None:
    assert not run(files, tmp_path, Listener(stop_after=2))
    (tmp_path / CHECKPOINTS / "step-00000002" / "optimizer.safetensors").unlink()
    listener = Listener()
    assert run(files, tmp_path, listener)
    assert (listener.told[0].start_step, listener.told[0].damaged_checkpoints) == (0, ("step-00000002",))


def test_a_checkpoint_of_another_configuration_is_refused(files: ModelFiles, tmp_path: Path) -> None:
    assert not run(files, tmp_path, Listener(stop_after=2))
    job = job_with(files.folder)
    other = Task(job, files.base, {"data": {"digest": "sha256:2"}}, storage_in(tmp_path))
    with pytest.raises(JobError, match=r"data\.digest was 'sha256:1', now 'sha256:2'") as caught:
        train(other, Models(load_model(files, job, CPU)), DATA, Worker(), Listener())
    assert caught.value.reason == Reason.CHECKPOINT_INCOMPATIBLE


class ShortOfMemory:
    """An objective that fails as torch does where a micro-batch is too large, before or after its backward pass began."""

    unit = "label"
    measured = Sft()

    def __init__(self, most: int) -> None:
        self.most = most
        self.refused = 0

    def loss(self, model: Any, batch: Any) -> Any:
        if model.module.training and batch.tokens > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return Sft().loss(model, batch)


@pytest.mark.parametrize("size", ["auto", 4])
def test_a_micro_batch_that_does_not_fit_is_halved_and_nothing_else_changes(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: Any
) -> None:
    """A step has four rows of up to 12 tokens; 24 fit at once."""
    settings = {"microBatchSize": size, "dropout": 0.0, "packing": False, "epochs": 1}
    assert run(files, tmp_path / "one by one", **{**settings, "microBatchSize": 1})
    objective, listener = ShortOfMemory(24), Listener()
    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: objective)
    assert run(files, tmp_path / "short", listener, **settings)
    assert 1 <= objective.refused <= 3
    (one, weights), (short, other) = result(tmp_path / "one by one"), result(tmp_path / "short")
    assert short == pytest.approx(one, abs=1e-5)
    for name in weights:
        torch.testing.assert_close(other[name], weights[name], atol=1e-5, rtol=1e-4)
    warnings = listener.told[-1].warnings
    assert 1 <= len(warnings) <= 3
    assert all(text.startswith("a micro-batch did not fit into memory: micro-batches are of ") for text in warnings)


def test_a_step_that_is_repeated_has_the_same_randomness(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One refusal in the midst of a step, then the same micro-batches: with dropout the end is the same to the bit."""

    class RefusesOnce:
        unit = "label"
        measured = Sft()
        calls = 0

        def loss(self, model: Any, batch: Any) -> Any:
            self.calls += model.module.training
            if model.module.training and self.calls == 4:
                raise torch.OutOfMemoryError("once")
            return Sft().loss(model, batch)

    settings = {"packing": False, "microBatchSize": 2, "epochs": 1}
    assert run(files, tmp_path / "undisturbed", **settings)
    objective = RefusesOnce()
    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: objective)
    monkeypatch.setattr(Limit, "halved", lambda self, *_: self)
    assert run(files, tmp_path / "repeated", **settings)
    assert objective.calls == 15 + 2
    same_end(tmp_path / "undisturbed", tmp_path / "repeated")


def test_a_single_row_that_does_not_fit_ends_it(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: ShortOfMemory(4))
    with pytest.raises(JobError, match="a single sequence does not fit") as caught:
        run(files, tmp_path, packing=False)
    assert caught.value.reason == Reason.GPU_OUT_OF_MEMORY


def test_two_workers_halve_together(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one of them is short: both take the step again, and the losses stay what they were."""
    job = job_with(files.folder, dropout=0.0, epochs=1, packing=False, microBatchSize=2)
    task = Task(job, files.base, CONFIG, storage_in(tmp_path / "one"))
    assert train(task, Models(load_model(files, job, CPU)), DATA, Worker(), Listener())

    objectives = iter([ShortOfMemory(1000), ShortOfMemory(13)])
    monkeypatch.setattr(loop, "begin_objective", lambda spec, context: next(objectives))
    together, task = Together(2), Task(job, files.base, CONFIG, storage_in(tmp_path / "two"))
    models, listener = [load_model(files, job, CPU) for _ in range(2)], Listener()
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(train, task, Models(model), DATA, together.worker(rank), listener) for rank, model in enumerate(models)]
        assert [one.result() for one in both] == [True, True]
    assert result(tmp_path / "two")[0] == pytest.approx(result(tmp_path / "one")[0], abs=1e-5)
    assert listener.told[-1].warnings


def test_a_call_to_regroup_saves_a_checkpoint_and_the_workers_leave(files: ModelFiles, tmp_path: Path) -> None:
    class Regrouping(Listener):
        @property
        def regroup_requested(self) -> bool:  # type: ignore[override]
            return self.asked == 5

    assert not run(files, tmp_path, Regrouping())
    assert steps_saved(tmp_path) == ["step-00000003", "step-00000005"]
