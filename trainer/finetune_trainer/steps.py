"""One optimiser step after the other: forward and backward over this worker's share, the sum over all workers, the update.

Two things are mended on the way (`remedy`). A micro-batch that does not fit into memory: all workers halve theirs and take the same step
again with the same randomness, so the global batch and what is learnt from it stay what they were. And a compiled layer that fails: the
worker goes through its share of the step again with the layers as they are.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Training
from finetune_trainer.data.batches import Batch, BatchPlan
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.tensors import MicroBatch, collate
from finetune_trainer.errors import JobError
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives import Objective
from finetune_trainer.objectives.sweep import sharing_of
from finetune_trainer.optimisation import Gradients, learning_rate, set_learning_rate, step_seed
from finetune_trainer.remedy import Remedy
from finetune_trainer.worker import Worker

LOSS, SHORT, SINGLE, MENDED, WISHES = 0, 1, 2, 3, 4
"""The step's own numbers beside the gradients: sum of the losses; workers short of memory, and for a single row; workers that have mended
something; rank 0's wishes."""


@dataclass(frozen=True)
class Wishes:
    """What rank 0 alone knows and all are to act on together."""

    stop: bool = False
    """The training is to be interrupted."""
    regroup: bool = False
    """More workers are there than take part."""
    ask: bool = False
    """It is time to ask whether a worker is about to be taken away."""


@dataclass(frozen=True)
class Taken:
    """A step that was taken."""

    loss: float
    """Mean over the units of the global batch."""
    learning_rate: float
    norm: float
    """Of the gradients, before they were clipped."""
    batch: Batch
    wishes: Wishes


@dataclass(frozen=True)
class Part:
    """A micro-batch of a step."""

    batch: MicroBatch
    idle: bool
    """Whether its loss does not count."""


@dataclass(frozen=True)
class Engine:
    """Everything that a step changes."""

    model: CausalModel
    objective: Objective
    optimizer: torch.optim.Optimizer
    gradients: Gradients


@dataclass(frozen=True)
class Share:
    """What the steps are taken on."""

    examples: Examples
    plan: BatchPlan


class Steps:
    """Takes the steps of one worker."""

    def __init__(self, engine: Engine, share: Share, training: Training, worker: Worker, remedy: Remedy) -> None:
        self._engine, self._training, self._worker, self._remedy = engine, training, worker, remedy
        self._plan, self._examples = share.plan, share.examples
        self._lengths = share.examples.lengths() + engine.model.virtual_tokens
        self._sharing = sharing_of(engine.model, worker)

    def ahead(self, steps: range) -> Iterator[tuple[int, list[Part]]]:
        """Each step with this worker's parts of it, which are made in another thread while the step before is computed."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            limit, coming = self._remedy.limit, pool.submit(self._parts, steps[0]) if steps else None
            for step in steps:
                assert coming is not None  # noqa: S101 - there is one for each step
                ready = coming.result()
                if limit != self._remedy.limit:  # made before memory was found to be short
                    ready = self._parts(step)
                limit, coming = self._remedy.limit, pool.submit(self._parts, step + 1) if step + 1 in steps else None
                yield step, ready

    def take(self, step: int, parts: list[Part], wishes: Wishes) -> Taken:
        """Take a step. All workers call it and get the same answer but for the wishes, which are rank 0's.

        Raises JobError (TrainingDiverged before a broken gradient reaches a weight, GPUOutOfMemory where a single row does not fit,
        WorkersLost where all workers must begin anew).
        """
        gradients, batch = self._engine.gradients, self._plan.batch(step)
        while True:
            self._remedy.computed(lambda: self._accumulate(step, parts, batch))  # noqa: B023 - called at once
            if self._remedy.mended:
                gradients.signals[MENDED] = 1
            # One all-reduce carries the gradients, the loss and what rank 0 wants all to know.
            if self._worker.leads:
                gradients.signals[WISHES:] = gradients.signals.new_tensor([wishes.stop, wishes.regroup, wishes.ask])
            gradients.sum_over(self._worker)
            norm = gradients.clip(self._training.max_grad_norm, self._worker)
            loss, short, single, mended, stop, regroup, ask, norm_before = torch.cat([gradients.signals, norm.view(1)]).tolist()
            if not short:
                break
            self._halve(batch, single=bool(single))
            parts = self._parts(step)
        self._remedy.settle(self._worker, mended)
        if not (math.isfinite(loss) and math.isfinite(norm_before)):
            raise JobError(Reason.TRAINING_DIVERGED, f"step {step + 1}: the loss is {loss}, the norm of the gradients {norm_before}")
        rate = learning_rate(step, self._plan.total_steps, self._training)
        set_learning_rate(self._engine.optimizer, rate)
        self._engine.optimizer.step()
        return Taken(loss, rate, norm_before, batch, Wishes(bool(stop), bool(regroup), bool(ask)))

    def _accumulate(self, step: int, parts: list[Part], batch: Batch) -> None:
        """The gradients, and the loss, of this worker's share of a step; or the signal that memory does not hold a part of it."""
        torch.manual_seed(step_seed(self._training.seed, step, self._worker.rank))
        model, gradients = self._engine.model, self._engine.gradients
        gradients.zero()
        count = batch.groups if self._engine.objective.unit == "group" else batch.labels
        for part in parts:
            try:
                loss = self._engine.objective.loss(model, part.batch.to(model.device)).total / count
                if part.idle:
                    loss = loss * 0.0
                loss.backward()  # type: ignore[no-untyped-call]
                gradients.signals[LOSS] += loss.detach()
            except torch.OutOfMemoryError:
                single = len(part.batch.row_documents) <= 1
                break
        else:
            return
        if model.sharded:  # the others wait for this one's part of a layer
            self._halve(batch, single=single)
        gradients.signals[SHORT] += 1
        gradients.signals[SINGLE] += single

    def _halve(self, batch: Batch, *, single: bool) -> None:
        """Half as much to hold in memory, the same for all workers. Raises JobError (GPUOutOfMemory, WorkersLost)."""
        self._remedy.halve(self._sharing.largest(batch.rows, self._lengths, self._remedy.limit), single=single)

    def _parts(self, step: int) -> list[Part]:
        """The step's part for this worker, in the pieces that it computes at once."""
        pieces = self._sharing.pieces(self._plan.batch(step).rows, self._lengths, self._remedy.limit)
        layout = self._engine.model.layout
        made = [Part(collate(self._examples, piece.rows, layout), piece.idle) for piece in pieces]
        return [replace(part, batch=_pinned(part.batch)) for part in made] if self._worker.device.type == "cuda" else made


def _pinned(batch: MicroBatch) -> MicroBatch:
    """The same in page-locked memory, from which a GPU copies without waiting."""
    tensors: dict[str, Any] = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors)
