"""The loop in several processes that are joined by torch's gloo, as Ray joins them: each process is one worker, on the CPU."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from fsspec.implementations.local import LocalFileSystem
from tests.unit.trainer_run.test_loop import CONFIG, DATA

from finetune_api.v1alpha1 import parse_job
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model_files import fetch_model
from finetune_trainer.placement import placed
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


@dataclass
class Recorder:
    """Remembers the loss of every step; asks for a stop after some."""

    stop_after: int | None
    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    asked: int = 0
    regroup_requested: bool = False

    @property
    def stop_requested(self) -> bool:
        self.asked += 1
        return self.stop_after is not None and self.asked >= self.stop_after

    def post(self, progress: Any) -> None:
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
    model, warnings = placed(files, job, worker)
    assert model.sharded == (run.manifest["spec"].get("compute") == {"strategy": "fsdp"})
    task = Task(job, files.base, CONFIG, Storage(LocalFileSystem(), str(run.folder), f"file://{run.folder}"))
    recorder, teacher, source = Recorder(run.stop_after), None, teacher_source(job)
    if source is not None:
        teacher = load_teacher(fetch_model(source, Mounts(run.folder, local=True), run.folder, weights=True), job, worker.device)
    train(task, Models(model, teacher, warnings=warnings), DATA, worker, recorder)
    if rank == 0:
        (run.folder / "told.json").write_text(json.dumps({"losses": recorder.losses, "norms": recorder.norms}))
    dist.destroy_process_group()
