"""How far the training is, told to whoever listens."""

import time
from typing import Protocol

from finetune_api.status import WARNING_LENGTH_MAX, WARNINGS_MAX, BestCheckpoint, CheckpointRef, Metric
from finetune_trainer.data.batches import BatchPlan
from finetune_trainer.evaluation import Losses, metric_of
from finetune_trainer.progress import WorkerProgress


class Listener(Protocol):
    """Whoever follows the training: in a job the head, over HTTP."""

    @property
    def stop_requested(self) -> bool:
        """Whether the training should be interrupted after this step."""
        ...

    @property
    def regroup_requested(self) -> bool:
        """Whether the training should be interrupted after this step to go on with more workers."""
        ...

    def post(self, progress: WorkerProgress) -> None:
        """Take the newest state. Must not block."""
        ...


class Teller:
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
        """The held-out losses after a step, and what else was measured."""
        self._metrics |= {metric_of(name): Metric(name=metric_of(name), value=value, step=done) for name, value in losses.items()}
        self._post()

    def checkpoint(self, latest: CheckpointRef | None, best: BestCheckpoint | None) -> None:
        """A checkpoint is complete."""
        self._progress = self._progress.model_copy(update={"checkpoint": latest, "best_checkpoint": best})
        self._post()

    def warn(self, text: str) -> None:
        """Something that the job's owner should look at although the job goes on."""
        known = self._progress.warnings
        if text not in known and len(known) < WARNINGS_MAX:
            self._progress = self._progress.model_copy(update={"warnings": (*known, text[:WARNING_LENGTH_MAX])})
            self._post()

    def stage(self, name: str, message: str) -> None:
        """Another stage has begun."""
        self._progress = self._progress.model_copy(update={"stage": name, "message": message})
        self._post()

    def _post(self) -> None:
        if self._listener is not None:
            self._progress = self._progress.model_copy(update={"metrics": tuple(self._metrics.values())})
            self._listener.post(self._progress)
