"""The training, from top to bottom, in plain torch: every worker runs this function.

What it computes follows from the task alone: order of the data from (seed, epoch), randomness from (seed, step, rank), so a run that was
interrupted gives what an undisturbed one gives. It can be called in one process, without Ray.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from finetune_api.reasons import Reason
from finetune_api.status import CheckpointRef, Metric
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer import checkpoint
from finetune_trainer.data.batches import AUTO_TOKENS, BatchPlan, micro_batches, plan_batches, rank_share
from finetune_trainer.data.examples import Examples, Prepared
from finetune_trainer.data.tensors import Layout, MicroBatch, collate
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation import Losses, measure
from finetune_trainer.methods import method_for
from finetune_trainer.methods.method import BaseModel, load_trained_state, trained_state
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives import Context, Objective, parameters_of
from finetune_trainer.objectives import begin as begin_objective
from finetune_trainer.optimisation import Gradients, adamw, learning_rate, load_moments, moments_of, set_learning_rate, step_seed
from finetune_trainer.progress import WorkerProgress
from finetune_trainer.result import Result, write_result
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

BASELINE = "baseline.json"
CHECKPOINTS = "checkpoints"
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


@dataclass(frozen=True)
class Models:
    """What is trained, and what it learns from where that is a model."""

    model: CausalModel
    teacher: CausalModel | None = None
    kept: Storage | None = None
    """Where what the teacher says of the training data is kept, or is to be."""


class Listener(Protocol):
    """Whoever follows the training: in a job the head, over HTTP."""

    @property
    def stop_requested(self) -> bool:
        """Whether the training should be interrupted after this step."""
        ...

    def post(self, progress: WorkerProgress) -> None:
        """Take the newest state. Must not block."""
        ...


def train(task: Task, models: Models, data: Prepared, worker: Worker, listener: Listener, group: str = "local") -> bool:
    """Train, measure before and after, leave the result in the storage.

    Returns whether it came to the end; else it has saved a checkpoint, since it was asked to stop or a worker is about to be taken away.
    Raises JobError (TrainingDiverged, StorageFull, CheckpointIncompatible, WorkersLost, ...).
    """
    spec, model = task.job.spec, models.model
    training, method = spec.training, method_for(spec.method)
    plan = plan_batches(data.train, training)
    held_out = {name: examples for name, examples in data.splits().items() if name != "train"}
    objective = begin_objective(spec.objective, Context(model, data, training, task.storage, worker, models.teacher, models.kept))
    extra = parameters_of(objective)
    parameters = [(name, parameter) for name, parameter in model.module.named_parameters() if parameter.requires_grad] + extra
    optimizer = adamw(parameters, training)
    gradients = Gradients((parameter for _, parameter in parameters), worker.device)
    checkpoints = task.storage.at(CHECKPOINTS)

    # Go on from the newest complete checkpoint, or measure the untuned model and begin.
    state, damaged = _resume(checkpoints, task.config, worker)
    measured = objective.measured
    baseline = _baseline(task.storage, worker, lambda: measure(model, measured, held_out, training, worker), fresh=state is None)
    if state is not None:
        load_trained_state(model.module, state.parameters, extra)
        load_moments(optimizer, parameters, state.moments)
    start, tokens = (state.step, state.trained_tokens) if state else (0, 0)
    latest = CheckpointRef(step=start, uri=checkpoints.locate(checkpoint.name_of(start))) if state else None
    del state  # a second copy of all that is trained, else held to the end
    begin = WorkerProgress(group=group, start_step=start, step=start, checkpoint=latest, damaged_checkpoints=damaged)
    follow = _Follower(listener if worker.leads else None, plan, begin)

    model.module.train()
    preemptions, shares = _Preemptions(worker), _Shares(data.train, plan, model.layout, training.micro_batch_size, worker)
    for step, micro in _ahead(shares.micro_batches, range(start, plan.total_steps)):
        batch, rate = plan.batch(step), learning_rate(step, plan.total_steps, training)
        torch.manual_seed(step_seed(training.seed, step, worker.rank))

        # Forward and backward over this worker's share; the sum is divided by the units of the whole batch.
        _accumulate(objective, model, micro, batch.groups if objective.unit == "group" else batch.labels, gradients)

        # One all-reduce carries the gradients, the loss and what rank 0 wants all to know.
        gradients.signals[1] = float(worker.leads and listener.stop_requested)
        gradients.signals[2] = float(worker.leads and preemptions.due())
        gradients.sum_over(worker)
        norm = gradients.clip(training.max_grad_norm)
        mean, stop, ask, norm_before = torch.cat([gradients.signals, norm.view(1)]).tolist()
        _check_finite(step + 1, mean, norm_before)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        done, tokens = step + 1, tokens + batch.tokens
        follow.step(done, batch.tokens, {"train/loss": mean, "train/learningRate": rate, "train/gradNorm": norm_before})

        # Save every so often and at the end; at a call to stop and when a worker is about to go, save and leave.
        due = done % spec.checkpoint.every_steps == 0 and done < plan.total_steps
        leave = (ask and preemptions.ask()) or stop
        if leave or due or done == plan.total_steps:
            saved = checkpoint.TrainingState(done, tokens, trained_state(model.module, extra), moments_of(optimizer, parameters))
            follow.checkpoint(_save(checkpoints, saved, task, worker))
        if leave and done < plan.total_steps:
            return False
        if due:
            follow.validation(done, measure(model, measured, {"validation": data.validation}, training, worker))

    follow.stage("Evaluate", "measuring the tuned model")
    losses = _finite(measure(model, measured, held_out, training, worker), Reason.TRAINING_DIVERGED, "the tuned model's")
    if worker.leads:
        result = Result(plan.total_steps, tokens, dict(baseline), dict(losses), task.config, kinds=spec.artifacts)
        write_result(task.storage, result, lambda folder, kind: method.export(model.module, folder, task.base, kind))
    return True


def _accumulate(objective: Objective, model: CausalModel, micro: list[MicroBatch], count: int, gradients: Gradients) -> None:
    """The gradients, and the loss, of this worker's share of a step."""
    gradients.zero()
    for part in micro:
        loss = objective.loss(model, part.to(model.device)).total / count
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.signals[0] += loss.detach()


def _save(checkpoints: Storage, state: checkpoint.TrainingState, task: Task, worker: Worker) -> CheckpointRef | None:
    """Rank 0 saves; the others go on and wait for it at the next step's all-reduce."""
    if not worker.leads:
        return None
    return CheckpointRef(step=state.step, uri=checkpoint.save(checkpoints, state, task.config, keep=task.job.spec.checkpoint.keep))


def _check_finite(step: int, loss: float, norm: float) -> None:
    """Raise JobError (TrainingDiverged) before a broken gradient reaches a weight. All workers see the same numbers."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise JobError(Reason.TRAINING_DIVERGED, f"step {step}: the loss is {loss}, the norm of the gradients {norm}")


def _resume(checkpoints: Storage, config: dict[str, Any], worker: Worker) -> tuple[checkpoint.TrainingState | None, tuple[str, ...]]:
    """The state to go on from, and the damaged ones that were set aside. Rank 0 proves and chooses; the others read what it chose."""
    state, damaged = checkpoint.newest(checkpoints, config) if worker.leads else (None, ())
    step = worker.agree(state.step + 1 if state else 0) - 1
    if step < 0:
        return None, damaged
    return state or checkpoint.load(checkpoints, step, config), damaged


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


class _Shares:
    """What one worker has of each step."""

    def __init__(self, examples: Examples, plan: BatchPlan, layout: Layout, size: int | Literal["auto"], worker: Worker) -> None:
        self._examples, self._plan, self._layout, self._size, self._worker = examples, plan, layout, size, worker
        self._lengths = examples.lengths()

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The step's part for this worker, in the pieces that it computes at once; none where there are fewer rows than workers."""
        device = self._worker.device.type
        share = rank_share(self._plan.batch(step).rows, self._lengths, self._worker.rank, self._worker.world)
        pieces = micro_batches(share, self._lengths, self._size, AUTO_TOKENS[device])
        made = [collate(self._examples, rows, self._layout) for rows in pieces]
        return [_pinned(batch) for batch in made] if device == "cuda" else made


def _pinned(batch: MicroBatch) -> MicroBatch:
    """The same in page-locked memory, from which a GPU copies without waiting."""
    tensors: dict[str, Any] = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors)


def _ahead(make: Callable[[int], list[MicroBatch]], steps: range) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Each step with its micro-batches, which are made in another thread while the step before is computed."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        coming = pool.submit(make, steps[0]) if steps else None
        for step in steps:
            assert coming is not None  # noqa: S101 - there is one for each step
            ready = coming.result()
            coming = pool.submit(make, step + 1) if step + 1 in steps else None
            yield step, ready


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


class _Follower:
    """Tells the listener how far it is; silent without one, as on all workers but the first."""

    def __init__(self, listener: Listener | None, plan: BatchPlan, progress: WorkerProgress) -> None:
        self._listener, self._plan = listener, plan
        self._progress = progress.model_copy(update={"total_steps": plan.total_steps})
        self._metrics: dict[str, Metric] = {}
        self._begun = time.monotonic()
        self._tokens_left = int(plan.row_tokens.sum()) * plan.epochs - sum(plan.batch(step).tokens for step in range(progress.step))
        self._post()

    def step(self, done: int, tokens: int, values: dict[str, float]) -> None:
        """One more step."""
        self._tokens_left -= tokens
        trained = self._progress.trained_tokens + tokens
        rate = trained / max(1e-9, time.monotonic() - self._begun)
        self._metrics |= {name: Metric(name=name, value=value, step=done) for name, value in values.items()}
        self._progress = self._progress.model_copy(
            update={
                "step": done,
                "epoch": self._plan.epoch(done),
                "trained_tokens": trained,
                "tokens_per_second": rate,
                "eta_seconds": round(self._tokens_left / rate),
            }
        )
        self._post()

    def validation(self, done: int, losses: Losses) -> None:
        """The held-out loss after a step. Raises JobError (TrainingDiverged) where it is no number."""
        for split, loss in _finite(losses, Reason.TRAINING_DIVERGED, f"step {done}: the").items():
            self._metrics[f"{split}/loss"] = Metric(name=f"{split}/loss", value=loss, step=done)
        self._post()

    def checkpoint(self, reference: CheckpointRef | None) -> None:
        """A checkpoint is complete."""
        self._progress = self._progress.model_copy(update={"checkpoint": reference})
        self._post()

    def stage(self, name: str, message: str) -> None:
        """Another stage has begun."""
        self._progress = self._progress.model_copy(update={"stage": name, "message": message})
        self._post()

    def _post(self) -> None:
        if self._listener is not None:
            self._progress = self._progress.model_copy(update={"metrics": tuple(self._metrics.values())})
            self._listener.post(self._progress)
