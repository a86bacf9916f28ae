"""What it saves to keep a teacher's answers: an epoch beside the live teacher, with what is kept while it is first made, and again.

The same student, data and steps each time, through the whole training loop in this process; only where the teacher's distribution comes
from differs. Kept are the 32 largest probabilities of every label.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from rich.table import Table
from tests.bench.subjects import HALF_B, LENGTH, Subject, make_model

from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.data.examples import Examples, Prepared, join
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model import load_model
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.objectives.distillation.teacher_cache import is_complete
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage
from finetune_trainer.teacher import load_teacher
from finetune_trainer.worker import Worker

STUDENT = Subject("8M parameters", 4, 256, 704, 4, 2, 8192, 24)
TEACHER = Subject("60M parameters", 10, 640, 1792, 10, 5, 8192, 24)
LARGE_TEACHER = Subject("3B parameters", 28, 3072, 8192, 24, 8, HALF_B.vocabulary, HALF_B.texts)
EPOCHS = 2
LARGEST = 32


@dataclass
class Timed:
    """A listener that notes when the last step ended."""

    stop_requested: bool = False
    regroup_requested: bool = False
    ended: float = 0.0
    loss: float = float("nan")

    def post(self, progress: Any) -> None:
        """A step has ended, or a stage begun."""
        if progress.stage == "Train":
            self.ended = time.monotonic()
            self.loss = next((metric.value for metric in progress.metrics if metric.name == "train/loss"), self.loss)


def compare(folder: Path) -> Table:
    """Train three times, and once on labels alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher = (HALF_B, LARGE_TEACHER) if device.type == "cuda" else (STUDENT, TEACHER)
    for name, subject in (("student", student), ("teacher", teacher)):
        make_model(subject, folder / name)
    data = _data(student)
    kept = _storage(folder / "kept")
    variants: dict[str, tuple[dict[str, Any] | None, Storage | None]] = {
        "labels alone": (None, None),
        "live teacher": ({}, None),
        "kept, the first time": ({"topK": LARGEST}, kept),
        "kept, again": ({"topK": LARGEST}, kept),
    }
    table = Table(
        title=f"Distillation: {student.name} from {teacher.name}, {len(data.train.tokens):,} tokens, {EPOCHS} epochs, {device.type}"
    )
    for column in ("teacher", "seconds per epoch", "of the live teacher's", "last loss"):
        table.add_column(column, justify="left" if column == "teacher" else "right")
    live = float("nan")
    for number, (name, (response, store)) in enumerate(variants.items()):
        seconds, loss = _train(folder, number, data, device, response, store)
        live = seconds if name == "live teacher" else live
        table.add_row(name, f"{seconds:.1f}", "" if np.isnan(live) else f"{seconds / live:.2f}", f"{loss:.3f}")
    labels = int(data.train.label_counts().sum())
    size = sum(path.stat().st_size for path in (folder / "kept").rglob("*.npy"))
    table.caption = f"kept: {size / labels:.0f} bytes a label, {LARGEST} tokens of {student.vocabulary:,}"
    return table


def _data(subject: Subject) -> Prepared:
    draw = np.random.Generator(np.random.Philox(1))

    def texts(count: int) -> Examples:
        lengths = draw.integers(16, LENGTH, count, endpoint=True)
        return join([(draw.integers(3, subject.vocabulary, length).astype(np.int32), np.arange(length) > 0) for length in lengths])

    return Prepared(texts(subject.texts), texts(1), None, 0, "sha256:bench")


def _train(
    folder: Path, number: int, data: Prepared, device: torch.device, response: dict[str, Any] | None, kept: Storage | None
) -> tuple[float, float]:
    """Seconds for each epoch, what the teacher is first asked included, and the last step's loss."""
    job = _job(folder, response)
    student = _files(folder, job, "student")
    needed = response is not None and not (kept is not None and is_complete(kept))
    teacher = load_teacher(_files(folder, job, "teacher"), job, device) if needed else None
    models, timed = Models(load_model(student, job, device), teacher, kept), Timed()
    begun = time.monotonic()
    train(Task(job, student.base, {}, _storage(folder / f"job-{number}")), models, data, Worker(device=device), timed)
    return (timed.ended - begun) / EPOCHS, timed.loss


def _job(folder: Path, response: dict[str, Any] | None) -> FineTuneJob:
    objective: dict[str, Any] = {"sft": {"lossOn": "all"}}
    if response is not None:
        objective = {"distillation": {"teacher": {"source": f"file://{folder}/teacher"}, "lossOn": "all", "response": response}}
    spec = {
        "model": {"source": f"file://{folder}/student"},
        "data": {"train": {"source": "file:///unused.jsonl"}},
        "method": {"full": {}},
        "objective": objective,
        "training": {"epochs": EPOCHS, "globalBatchSize": 4, "maxSequenceLength": LENGTH, "learningRate": 1e-3},
        "checkpoint": {"everySteps": 10_000},
        "output": {"storage": "file:///unused"},
    }
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench", "uid": "bench"}, "spec": spec}
    return parse_job(json.loads(json.dumps(manifest)), local=True)


def _files(folder: Path, job: FineTuneJob, name: str) -> ModelFiles:
    source = job.spec.model.model_copy(update={"source": f"file://{folder}/{name}"})
    return fetch_model(source, Mounts(folder, local=True), folder / "cache", weights=True)


def _storage(folder: Path) -> Storage:
    return Storage(LocalFileSystem(), str(folder), f"file://{folder}")
