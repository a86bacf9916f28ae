"""How far the training is, told to whoever listens."""

import time
from typing import Protocol

from finetune_api.status import WARNING_LENGTH_MAX, WARNINGS_MAX, BestCheckpoint, CheckpointRef, Metric
from finetune_trainer.data.batches import BatchPlan
from finetune_trainer.device import Device
from finetune_trainer.evaluation import Losses, metric_of
from finetune_trainer.pace import Pace, SavedCheckpoint
from finetune_trainer.progress import WorkerProgress, utc_now


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

    def __init__(self, listener: Listener | None, plan: BatchPlan, progress: WorkerProgress, device: Device | None = None) -> None:
        self._listener, self._plan, self._device = listener, plan, device
        self._pace = Pace(peak_flops=device.peak_flops if device else None)
        self._progress = progress.model_copy(update={"total_steps": plan.total_steps})
        self._metrics: dict[str, Metric] = {}
        self._begun = self._stepping_since = time.monotonic()
        self._tokens_left = int(plan.row_tokens.sum()) * plan.epochs - sum(plan.batch(step).tokens for step in range(progress.step))
        self._post()

    def step(self, done: int, tokens: int, values: dict[str, float], *, another: bool = True) -> None:
        """One more step; `another` follows at once."""
        now = time.monotonic()
        taken = now - self._stepping_since
        peak = self._device.memory_peak if self._device else None
        self._pace = self._pace.model_copy(
            update={"step_seconds": taken, "stepping_seconds": self._pace.stepping_seconds + taken, "memory_peak_bytes": peak}
        )
        self._tokens_left -= tokens
        trained = self._progress.trained_tokens + tokens
        rate = trained / max(1e-9, now - self._begun)
        self._metrics |= {name: Metric(name=name, value=value, step=done) for name, value in values.items()}
        self._progress = self._progress.model_copy(
            update={
                "step": done,
                "epoch": self._plan.epoch(done),
                "trained_tokens": trained,
                "tokens_per_second": rate,
                "eta_seconds": round(self._tokens_left / rate),
                "stepping": another,
            }
        )
        self._post()
        self._stepping_since = now

    def validation(self, done: int, losses: Losses) -> None:
        """The held-out losses after a step, and what else was measured."""
        self._metrics |= {metric_of(name): Metric(name=metric_of(name), value=value, step=done) for name, value in losses.items()}
        self._post()
        self._stepping_since = time.monotonic()

    def checkpoint(self, latest: CheckpointRef | None, best: BestCheckpoint | None, saved: SavedCheckpoint | None = None) -> None:
        """A checkpoint is complete, and has just been saved where `saved` says so; or another one is the best."""
        if saved:
            update = {"checkpoint_seconds": saved.seconds, "checkpoint_bytes": saved.bytes, "checkpoint_time": utc_now()}
            self._pace = self._pace.model_copy(update=update)
        self._progress = self._progress.model_copy(update={"checkpoint": latest, "best_checkpoint": best})
        self._post()
        self._stepping_since = time.monotonic()

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
            self._progress = self._progress.model_copy(update={"metrics": tuple(self._metrics.values()), "pace": self._pace})
            self._listener.post(self._progress)
