"""How far the training is, what its checkpoints hold of that, and which of them is the best."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.reasons import Reason
from finetune_api.status import BestCheckpoint, CheckpointRef
from finetune_api.v1alpha1 import Spec
from finetune_trainer import checkpoint
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation import Losses
from finetune_trainer.evaluation.history import History
from finetune_trainer.model import CausalModel
from finetune_trainer.optimisation import NamedParameters, moments_of, restore, restore_parameters
from finetune_trainer.pace import SavedCheckpoint
from finetune_trainer.stopping import Validations
from finetune_trainer.storage import Storage
from finetune_trainer.telling import Teller
from finetune_trainer.worker import Worker

VALIDATION = "validation"
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the job's own."""


@dataclass(frozen=True)
class Trained:
    """What a checkpoint is of."""

    model: CausalModel
    parameters: NamedParameters
    """Everything that trains, by name."""
    optimizer: torch.optim.Optimizer


class Keeper:
    """Counts, saves and restores. All workers call its methods at the same points."""

    def __init__(self, job: Storage, config: Mapping[str, Any], spec: Spec, trained: Trained, worker: Worker) -> None:
        """`job` is the job's own folder of output.storage."""
        self._job, self._storage, self._config, self._trained, self._worker = job, job.at(CHECKPOINTS), config, trained, worker
        self._rule, self._every, self._keep = spec.training.early_stopping, spec.checkpoint.every_steps, spec.checkpoint.keep
        self.step = 0
        """Optimiser steps done."""
        self.tokens = 0
        """Tokens of examples that they were taken on."""
        self.last_validation: Losses = {}
        """The validation loss of the state as it is; empty where it was not measured."""
        self._validations = Validations()
        self._latest: CheckpointRef | None = None
        self._history = History(None)

    @property
    def over(self) -> bool:
        """Whether early stopping ends the training here."""
        return self._validations.over(self._rule)

    def owes_validation(self, total_steps: int) -> bool:
        """Whether the training was interrupted between the checkpoint that it goes on from and the measurement that belongs to it."""
        belongs = self.step % self._every == 0 or self.step == total_steps
        return self.step > 0 and belongs and self._validations.step < self.step

    @property
    def best(self) -> BestCheckpoint | None:
        """The checkpoint with the lowest validation loss."""
        step, loss = self._validations.best_step, self._validations.best_loss
        if step is None or loss is None:
            return None
        return BestCheckpoint(step=step, uri=self._locate(step), metric=f"{VALIDATION}/loss", value=loss)

    @property
    def latest(self) -> CheckpointRef | None:
        """The newest complete checkpoint."""
        return self._latest

    def resume(self) -> tuple[str, ...]:
        """Go on from the newest complete checkpoint, if there is one. Returns the names of damaged ones that were set aside.

        Rank 0 proves and chooses; the others read what it chose, and each worker reads only what it holds.
        """
        state, damaged = checkpoint.newest(self._storage, self._config) if self._worker.leads else (None, ())
        step = self._worker.agree(state.step + 1 if state else 0) - 1
        if step >= 0:
            state = state or checkpoint.find(self._storage, step, self._config, proven=True)
            self._trained.model.settle()
            with checkpoint.opened(self._storage, state) as (parameters, moments):
                restore(self._trained.optimizer, self._trained.parameters, parameters, moments)
            self.step, self.tokens, self._validations = state.step, state.trained_tokens, state.validations
            self._latest = CheckpointRef(step=step, uri=self._locate(step))
        self._history = History(self._job if self._worker.leads else None, self.step)
        return damaged

    def note_untuned(self, losses: Losses) -> None:
        """What the untuned model was measured to have, for the course of the losses."""
        self._history.held_out(0, losses)

    def note_step(self, figures: Mapping[str, float]) -> None:
        """The figures of the step just counted, likewise."""
        self._history.train(self.step, figures)

    def count(self, tokens: int) -> int:
        """One more step. Returns how many there are."""
        self.step, self.tokens, self.last_validation = self.step + 1, self.tokens + tokens, {}
        return self.step

    def save(self, teller: Teller) -> None:
        """Save the state as it is: sharded, all workers together; else rank 0 alone, and the others wait for it at the next step."""
        begun = time.monotonic()
        self._history.keep()
        parameters = {name: parameter.detach() for name, parameter in self._trained.parameters}
        moments = moments_of(self._trained.optimizer, self._trained.parameters)
        state = checkpoint.TrainingState(self.step, self.tokens, parameters, moments, self._validations)
        if self._worker.leads or state.sharded:
            checkpoint.save(self._storage, state, self._config, keep=self._keep, worker=self._worker)
        self._latest = CheckpointRef(step=self.step, uri=self._locate(self.step))
        teller.checkpoint(self._latest, self.best, SavedCheckpoint(time.monotonic() - begun, state.bytes))

    def validate(self, losses: Losses, teller: Teller) -> None:
        """Take the validation loss of the checkpoint just saved. Raises JobError (TrainingDiverged) where it is no number."""
        for name, value in losses.items():
            if not math.isfinite(value):
                raise JobError(Reason.TRAINING_DIVERGED, f"step {self.step}: the {name} {'' if '/' in name else 'loss '}is {value}")
        if VALIDATION in losses:
            self._validations = self._validations.after(self.step, losses[VALIDATION], self._rule)
        self.last_validation = losses
        self._history.held_out(self.step, losses)
        self._history.keep()
        teller.validation(self.step, losses)
        teller.checkpoint(self._latest, self.best)

    def take_best(self, teller: Teller) -> None:
        """Put the best checkpoint's parameters in place of the last ones; they stay where it turns out to be damaged."""
        best = self._validations.best_step
        if best is None or best == self.step:
            return
        state = None
        if self._worker.leads:
            try:
                state = checkpoint.find(self._storage, best, self._config)
            except JobError as error:
                teller.warn(f"the best checkpoint is lost, the last one is published: {error.message}")
        if not self._worker.agree(int(state is not None)):
            return
        state = state or checkpoint.find(self._storage, best, self._config, proven=True)
        self._trained.model.settle()
        with checkpoint.opened(self._storage, state) as (parameters, _):
            restore_parameters(self._trained.parameters, parameters)
        self.step, self.tokens = state.step, state.trained_tokens
        self.last_validation = {}  # of what was measured then the loss alone is kept: there may be more to say

    def remove_damaged(self) -> None:
        """Nobody needs what was set aside, now that all went well. It is not worth failing for."""
        if self._worker.leads:
            with suppress(JobError):
                checkpoint.remove_damaged(self._storage)

    @contextmanager
    def named_in_divergence(self) -> Iterator[None]:
        """Have an error that says that the training diverges name the checkpoint to go back to."""
        try:
            yield
        except JobError as error:
            if error.reason != Reason.TRAINING_DIVERGED:
                raise
            last = f"the last good checkpoint is {self._latest.uri}" if self._latest else "there is no checkpoint before it"
            raise JobError(error.reason, f"{error.message}; {last}") from error

    def _locate(self, step: int) -> str:
        return self._storage.locate(checkpoint.name_of(step))
