"""The loop in several processes that are joined by torch's gloo, as Ray joins them: each process is one worker, on the CPU."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from fsspec.implementations.local import LocalFileSystem
from tests.unit.trainer_run.test_loop import CONFIG, DATA

from finetune_api.v1alpha1 import parse_job
from finetune_trainer.failures import as_job_error, is_final
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model_files import fetch_model
from finetune_trainer.placement import placed
from finetune_trainer.sharding import decoder_layers
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage
from finetune_trainer.teacher import load_teacher, teacher_source
from finetune_trainer.worker import Worker

RENDEZVOUS = "rendezvous"


@dataclass(frozen=True)
class Run:
    """One start of a group of workers."""

    manifest: dict[str, Any]
    model: Path
    folder: Path
    """The job's own folder in the storage."""
    world: int
    stop_after: int | None = None
    """Steps after which the group is asked to stop."""
    fails: "Fails | None" = None


@dataclass(frozen=True)
class Fails:
    """What happens to the first layer of the last worker, in the midst of a pass in which the others wait for it."""

    call: int
    """Of its forward passes, counted from 1: the one that fails."""
    training: bool
    """Whether those of training are meant, or those of evaluation."""
    compiled: bool = False
    """Whether it is compiled, and what fails is not memory."""
    at_first: bool = False
    """Whether it cannot be compiled at all, and nothing else fails."""


@dataclass
class Recorder:
    """Remembers the loss of every step and the warnings; asks for a stop after some."""

    stop_after: int | None
    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    asked: int = 0
    regroup_requested: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def stop_requested(self) -> bool:
        self.asked += 1
        return self.stop_after is not None and self.asked >= self.stop_after

    def post(self, progress: Any) -> None:
        self.warnings = progress.warnings
        for metric in progress.metrics:
            if metric.name == "train/loss":
                self.losses[metric.step] = metric.value
            if metric.name == "train/gradNorm":
                self.norms[metric.step] = metric.value


def start(run: Run) -> tuple[dict[int, float], dict[int, float]]:
    """Run a group to its end or stop. Returns the losses and gradient norms of the steps that it took."""
    run.folder.mkdir(parents=True, exist_ok=True)
    meeting = run.folder / RENDEZVOUS
    meeting.unlink(missing_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    processes.spawn(_work, (run,), nprocs=run.world)
    told = json.loads((run.folder / "told.json").read_text())
    return {int(step): loss for step, loss in told["losses"].items()}, {int(step): norm for step, norm in told["norms"].items()}


def _work(rank: int, run: Run) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{run.folder / RENDEZVOUS}", rank=rank, world_size=run.world)
    worker = Worker(rank=rank, world=run.world, all_reduce=dist.all_reduce)
    job = parse_job(run.manifest, local=True)
    files = fetch_model(job.spec.model, Mounts(run.model, local=True), run.model / "cache", weights=True)
    if run.fails is not None and run.fails.at_first:
        _compile_first(last=rank == run.world - 1)
    model, warnings = placed(files, job, worker)
    assert model.sharded == (run.manifest["spec"].get("compute") == {"strategy": "fsdp"})
    task = Task(job, files.base, CONFIG, Storage(LocalFileSystem(), str(run.folder), f"file://{run.folder}"))
    recorder, teacher, source = Recorder(run.stop_after), None, teacher_source(job)
    if source is not None:
        teacher = load_teacher(fetch_model(source, Mounts(run.folder, local=True), run.folder, weights=True), job, worker.device)
    if run.fails is not None and not run.fails.at_first:
        _fail(decoder_layers(model.transformer), run.fails, last=rank == run.world - 1)
    try:
        train(task, Models(model, teacher, warnings=warnings), DATA, worker, recorder)
    except Exception as error:
        (run.folder / f"ended-{rank}.json").write_text(json.dumps([as_job_error(error).reason, is_final(error)]))
        raise
    if rank == 0:
        told = {"losses": recorder.losses, "norms": recorder.norms, "warnings": recorder.warnings}
        (run.folder / "told.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def _fail(layers: list[torch.nn.Module], fails: Fails, *, last: bool) -> None:
    """Have the first layer fail as it is told, on the worker that is the last."""
    calls = 0

    def forward(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += layers[0].training is fails.training
        if last and calls == fails.call and layers[0].training is fails.training:
            raise RuntimeError("no kernel for this shape") if fails.compiled else torch.OutOfMemoryError("CUDA out of memory")
        return own(*arguments, **named)

    own = layers[0].forward
    if fails.compiled:
        forward._torchdynamo_orig_callable = own  # type: ignore[attr-defined]  # as torch.compile marks what it makes
    layers[0].forward = forward


def _compile_first(*, last: bool) -> None:
    """Have torch.compile make nothing faster in this process, and fail on the worker that is the last."""

    def compile_one(call: Callable[..., Any], **_: object) -> Callable[..., Any]:
        def forward(*arguments: Any, **named: Any) -> Any:
            return call(*arguments, **named)

        if last:
            raise RuntimeError("no space left on device")
        forward._torchdynamo_orig_callable = call  # type: ignore[attr-defined]
        return forward

    torch.compile = compile_one  # type: ignore[assignment]
