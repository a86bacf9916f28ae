"""One optimiser step after the other: forward and backward over this worker's share, the sum over all workers, the update.

A micro-batch that does not fit into memory is the one thing that is mended on the way: all workers halve theirs and take the same step
again with the same randomness, so the global batch and what is learnt from it stay what they were.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Training
from finetune_trainer.data.batches import Batch, BatchPlan
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.shares import Limit
from finetune_trainer.data.tensors import MicroBatch, collate
from finetune_trainer.errors import JobError
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives import Objective
from finetune_trainer.objectives.sweep import sharing_of
from finetune_trainer.optimisation import Gradients, learning_rate, set_learning_rate, step_seed
from finetune_trainer.telling import Teller
from finetune_trainer.worker import Worker

LOSS, SHORT, SINGLE, WISHES = 0, 1, 2, 3
"""The step's own numbers beside the gradients: sum of the losses; workers short of memory, and for a single row; rank 0's wishes."""


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
    limit: Limit


def shortage(limit: Limit) -> str:
    """What to tell the job's owner."""
    return f"a micro-batch did not fit into memory: micro-batches are of {limit} now; the global batch is as it was"


class Steps:
    """Takes the steps of one worker."""

    def __init__(self, engine: Engine, share: Share, training: Training, worker: Worker, remember: Callable[[Limit], None]) -> None:
        """`remember` keeps a limit for the next start."""
        self._engine, self._training, self._worker, self._remember = engine, training, worker, remember
        self._plan, self._examples = share.plan, share.examples
        self._lengths = share.examples.lengths() + engine.model.virtual_tokens
        self._sharing = sharing_of(engine.model, worker)
        self.limit = share.limit

    def ahead(self, steps: range) -> Iterator[tuple[int, list[Part]]]:
        """Each step with this worker's parts of it, which are made in another thread while the step before is computed."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            limit, coming = self.limit, pool.submit(self._parts, steps[0]) if steps else None
            for step in steps:
                assert coming is not None  # noqa: S101 - there is one for each step
                ready = coming.result()
                if limit != self.limit:  # made before memory was found to be short
                    ready = self._parts(step)
                limit, coming = self.limit, pool.submit(self._parts, step + 1) if step + 1 in steps else None
                yield step, ready

    def take(self, step: int, parts: list[Part], wishes: Wishes, teller: Teller) -> Taken:
        """Take a step. All workers call it and get the same answer but for the wishes, which are rank 0's.

        Raises JobError (TrainingDiverged before a broken gradient reaches a weight, GPUOutOfMemory where a single row does not fit).
        """
        gradients, batch = self._engine.gradients, self._plan.batch(step)
        while True:
            torch.manual_seed(step_seed(self._training.seed, step, self._worker.rank))
            gradients.zero()
            self._accumulate(parts, batch)
            # One all-reduce carries the gradients, the loss and what rank 0 wants all to know.
            if self._worker.leads:
                gradients.signals[WISHES:] = gradients.signals.new_tensor([wishes.stop, wishes.regroup, wishes.ask])
            gradients.sum_over(self._worker)
            norm = gradients.clip(self._training.max_grad_norm, self._worker)
            loss, short, single, stop, regroup, ask, norm_before = torch.cat([gradients.signals, norm.view(1)]).tolist()
            if not short:
                break
            self.limit = self._halved(batch, hopeless=bool(single))
            teller.warn(shortage(self.limit))
            parts = self._parts(step)
        if not (math.isfinite(loss) and math.isfinite(norm_before)):
            raise JobError(Reason.TRAINING_DIVERGED, f"step {step + 1}: the loss is {loss}, the norm of the gradients {norm_before}")
        rate = learning_rate(step, self._plan.total_steps, self._training)
        set_learning_rate(self._engine.optimizer, rate)
        self._engine.optimizer.step()
        return Taken(loss, rate, norm_before, batch, Wishes(bool(stop), bool(regroup), bool(ask)))

    def _accumulate(self, parts: list[Part], batch: Batch) -> None:
        """The gradients, and the loss, of this worker's share of a step; or the signal that memory does not hold a part of it."""
        model, gradients = self._engine.model, self._engine.gradients
        count = batch.groups if self._engine.objective.unit == "group" else batch.labels
        for part in parts:
            try:
                loss = self._engine.objective.loss(model, part.batch.to(model.device)).total / count
                if part.idle:
                    loss = loss * 0.0
                loss.backward()  # type: ignore[no-untyped-call]
                gradients.signals[LOSS] += loss.detach()
            except torch.OutOfMemoryError as error:
                single = len(part.batch.row_documents) <= 1
                if model.sharded:
                    raise self._give_up(batch, hopeless=single) from error
                gradients.signals[SHORT] += 1
                gradients.signals[SINGLE] += single
                break
        if gradients.signals[SHORT] and model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halved(self, batch: Batch, *, hopeless: bool) -> Limit:
        """Half as much to hold in memory. Raises JobError (GPUOutOfMemory) where that is less than a row."""
        if hopeless:
            raise JobError(Reason.GPU_OUT_OF_MEMORY, "a single sequence does not fit into the memory of a worker")
        return self.limit.halved(self._sharing.largest(batch.rows, self._lengths, self.limit))

    def _give_up(self, batch: Batch, *, hopeless: bool) -> JobError:
        """What ends the group where the others wait for this worker's part of a layer: only a new start, with half, helps them."""
        try:
            limit = self._halved(batch, hopeless=hopeless)
        except JobError as error:
            return error
        self._remember(limit)
        return JobError(Reason.WORKERS_LOST, shortage(limit))

    def _parts(self, step: int) -> list[Part]:
        """The step's part for this worker, in the pieces that it computes at once."""
        pieces = self._sharing.pieces(self._plan.batch(step).rows, self._lengths, self.limit)
        layout = self._engine.model.layout
        made = [Part(collate(self._examples, piece.rows, layout), piece.idle) for piece in pieces]
        return [replace(part, batch=_pinned(part.batch)) for part in made] if self._worker.device.type == "cuda" else made


def _pinned(batch: MicroBatch) -> MicroBatch:
    """The same in page-locked memory, from which a GPU copies without waiting."""
    tensors: dict[str, Any] = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors)
