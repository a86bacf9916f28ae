"""The training, from top to bottom, in plain torch: every worker runs this function.

What it computes follows from the task alone: order of the data from (seed, epoch), randomness from (seed, step, rank), so a run that was
interrupted gives what an undisturbed one gives. It can be called in one process, without Ray.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from finetune_api.evaluation import EARLIER
from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import ArtifactKind, FineTuneJob, Spec
from finetune_trainer import checkpoint
from finetune_trainer.data.batches import plan_batches
from finetune_trainer.data.examples import Examples, Prepared
from finetune_trainer.device import Device
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation import Losses, measure
from finetune_trainer.keeping import CHECKPOINTS, VALIDATION, Keeper, Trained
from finetune_trainer.methods import method_for
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives import Context, parameters_of
from finetune_trainer.objectives import begin as begin_objective
from finetune_trainer.optimisation import Gradients, adamw
from finetune_trainer.progress import WorkerProgress
from finetune_trainer.remedy import TRAINING, Notes, Remedy, limit_of
from finetune_trainer.result import Result, write_result
from finetune_trainer.sharding import whole
from finetune_trainer.steps import Engine, Share, Steps, Wishes
from finetune_trainer.storage import Storage
from finetune_trainer.telling import Listener, Teller
from finetune_trainer.worker import Worker

BASELINE = "baseline.json"
REMEDY = "remedy.json"
"""What a start before this one has found that it must do otherwise."""
PREEMPTION_SECONDS = 2.0
"""How often the workers ask whether one of them is about to be taken away."""


@dataclass(frozen=True)
class Task:
    """What to train, wherever it runs."""

    job: FineTuneJob
    base: BaseModel
    config: dict[str, Any]
    """Everything that the result follows from: a checkpoint made under another is refused."""
    storage: Storage
    """The job's own folder in output.storage."""
    exports: bool = True
    """Whether the result holds the weights as they are published: of a trial only the figures are of use."""

    @property
    def kinds(self) -> tuple[ArtifactKind, ...]:
        """What the result holds of the weights."""
        return self.job.spec.artifacts if self.exports else ()


@dataclass(frozen=True)
class Models:
    """What is trained, and what it learns from where that is a model."""

    model: CausalModel
    teacher: CausalModel | None = None
    kept: Storage | None = None
    """Where what the teacher says of the training data is kept, or is to be."""
    warnings: tuple[str, ...] = ()
    """What the job's owner should know of how they were made."""


def train(task: Task, models: Models, data: Prepared, worker: Worker, listener: Listener, group: str = "local") -> bool:
    """Train, measure before and after, leave the result in the storage.

    Returns whether it came to the end; else it has saved a checkpoint, since it was asked to stop, a worker is about to be taken away, or
    the workers are to begin anew with more of them. Raises JobError (TrainingDiverged, GPUOutOfMemory, StorageFull, CheckpointIncompatible,
    WorkersLost, ...).
    """
    spec, model, training = task.job.spec, models.model, task.job.spec.training
    plan = plan_batches(data.train, training)
    held_out = {name: examples for name, examples in data.splits().items() if name != "train"}
    on_the_way = {name: examples for name, examples in held_out.items() if name in judged_on_the_way(spec)}
    remedy = _remedy(task, model, worker)
    objective = begin_objective(spec.objective, Context(model, data, training, task.storage, worker, models.teacher, models.kept, remedy))
    parameters = [(name, parameter) for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    parameters += parameters_of(objective)
    optimizer, gradients = adamw(parameters, training), Gradients((parameter for _, parameter in parameters), worker.device)

    def measured(splits: Mapping[str, Examples]) -> Losses:
        return measure(model, objective.measured, splits, training, worker, remedy)

    # Go on from the newest complete checkpoint, or measure the untuned model and begin.
    keeper = Keeper(task.storage, task.config, spec, Trained(model, parameters, optimizer), worker)
    damaged = keeper.resume()
    baseline = _baseline(task.storage, worker, lambda: measured(held_out), fresh=keeper.step == 0)
    keeper.note_untuned({name: loss for name, loss in baseline.items() if name.partition("/")[0] == VALIDATION})
    begin = WorkerProgress(
        group=group, processes=worker.world, start_step=keeper.step, step=keeper.step, damaged_checkpoints=damaged, checkpoint=keeper.latest
    )
    begin = begin.model_copy(update={"best_checkpoint": keeper.best})
    tell = Teller(listener if worker.leads else None, plan, begin, Device(worker.device))
    for warning in models.warnings:
        tell.warn(warning)
    remedy.tell_to(tell.warn)
    if keeper.owes_validation(plan.total_steps):
        keeper.validate(measured(on_the_way), tell)

    model.module.train()
    steps = Steps(Engine(model, objective, optimizer, gradients), Share(data.train, plan), training, worker, remedy)
    preemptions = _Preemptions(worker)
    for step, parts in steps.ahead(range(keeper.step, keeper.step if keeper.over else plan.total_steps)):
        wishes = Wishes(listener.stop_requested, listener.regroup_requested, preemptions.due()) if worker.leads else Wishes()
        with keeper.named_in_divergence():
            taken = steps.take(step, parts, wishes)
        done, last = keeper.count(taken.batch.tokens), step + 1 == plan.total_steps
        figures = {"train/loss": taken.loss, "train/learningRate": taken.learning_rate, "train/gradNorm": taken.norm}
        keeper.note_step(figures)

        # Save and measure every so often and at the end; at a call to leave and when a worker is about to go, save and leave.
        due = done % spec.checkpoint.every_steps == 0 or last
        leave = (taken.wishes.ask and preemptions.ask()) or taken.wishes.stop or taken.wishes.regroup
        tell.step(done, taken.batch.tokens, figures, another=not (due or leave))
        if leave or due:
            keeper.save(tell)
        if leave and not last:
            return False
        if due:
            with keeper.named_in_divergence():
                keeper.validate(measured(on_the_way), tell)
        if keeper.over:
            break

    # What is measured and published is the last state; with early stopping, the best.
    if training.early_stopping:
        keeper.take_best(tell)
    known = keeper.last_validation
    tell.stage("Evaluate", f"measuring the tuned model after step {keeper.step}")
    rest = {name: examples for name, examples in held_out.items() if name not in known}
    losses = _finite({**known, **measured(rest)}, Reason.TRAINING_DIVERGED, "the tuned model's")
    _finish(task, Result(keeper.step, keeper.tokens, dict(baseline), dict(losses), task.config, kinds=task.kinds), model, worker)
    keeper.remove_damaged()
    return True


def judged_on_the_way(spec: Spec) -> tuple[str, ...]:
    """The splits whose losses are measured of every checkpoint: of an earlier one that may be published, all that a gate asks for."""
    if EARLIER in spec.evaluation.compare_with:
        return (VALIDATION, "test")
    gates = spec.evaluation.gates if spec.evaluation.on_gate_failure == "tryEarlierCheckpoint" else ()
    return (VALIDATION, *({"test"} & {gate.metric.partition("/")[0] for gate in gates}))


def export_earlier(task: Task, model: CausalModel, result: Result, worker: Worker) -> None:
    """Leave the model as it was after result.steps in place of the result that there is. Every worker calls it. Raises JobError."""
    checkpoint.restore_model(model, task.storage.at(CHECKPOINTS), result.steps, task.config, worker)
    _finish(task, result, model, worker)


def _remedy(task: Task, model: CausalModel, worker: Worker) -> Remedy:
    """What is done where something fails, as far as an earlier start has found out. Every worker calls it."""
    remedy = Remedy(TRAINING, model, limit_of(task.job.spec.training, model), notes=Notes(task.storage, REMEDY))
    remedy.resume(worker)
    return remedy


def _finish(task: Task, result: Result, model: CausalModel, worker: Worker) -> None:
    """Leave the result: rank 0 writes it, from the whole model."""
    method = method_for(task.job.spec.method)
    with whole(model.module, model.transformer, leads=worker.leads) if model.sharded else nullcontext():
        if worker.leads:
            write_result(task.storage, result, lambda folder, kind: method.export(model.module, folder, task.base, kind))


def _baseline(storage: Storage, worker: Worker, measure_now: Callable[[], Losses], *, fresh: bool) -> Losses:
    """The untuned model's losses: kept from the first time, since a model that is gone on with is not the untuned one any more."""
    known = storage.read_json(BASELINE) if worker.leads else None
    if worker.agree(int(known is not None)):
        return dict(known or {})
    if not fresh:
        return {}
    losses = _finite(measure_now(), Reason.MODEL_INVALID, "the untuned model's")
    if worker.leads:
        storage.write_json(BASELINE, dict(losses))
    return losses


def _finite(losses: Losses, reason: Reason, whose: str) -> Losses:
    """The losses. Raises JobError where one is no number."""
    for split, loss in losses.items():
        if not math.isfinite(loss):
            raise JobError(reason, f"{whose} {split} loss is {loss}")
    return losses


class _Preemptions:
    """When to ask whether a worker is about to be taken away. Asking is collective, so rank 0's clock decides for all."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._asked = worker, time.monotonic()

    def due(self) -> bool:
        """Whether it is time to ask again."""
        return time.monotonic() - self._asked > PREEMPTION_SECONDS

    def ask(self) -> bool:
        """Whether a worker is about to be taken away."""
        self._asked = time.monotonic()
        return self._worker.preempted()
