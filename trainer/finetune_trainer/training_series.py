"""The series that a head's /metrics has: the report's numbers, and what only the workers measure. Pure.

They have no labels but `stage`: whose they are is told by the target that Prometheus scrapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from finetune_api.report import Report
from finetune_trainer.pace import Pace, mfu

SERIES = 19
"""With those that the operator tells, a job has 60 at most."""
PREFIX = "finetune_training_"


@dataclass(frozen=True)
class Series:
    """One number to be told."""

    name: str
    """Without prefix; a counter's without `_total`."""
    help: str
    value: float | None
    """None is left out."""
    kind: Literal["gauge", "counter"] = "gauge"


@dataclass(frozen=True)
class Workers:
    """What the newest word of the workers tells beyond the report."""

    pace: Pace = field(default_factory=Pace)
    processes: int = 0
    goodput: float | None = None


def series(report: Report, workers: Workers) -> Iterator[Series]:
    """Every series without labels, whether its value is known or not."""
    yield from _progress(report)
    yield from _measures(report)
    yield from _paced(report, workers)


def running_stage(report: Report) -> str | None:
    """The stage that runs, if one does."""
    return next((stage.name for stage in report.stages if stage.state == "Running"), None)


def _progress(report: Report) -> Iterator[Series]:
    progress, usage = report.progress, report.usage
    yield Series("attempt", "The job's attempt that this is.", report.attempt)
    yield Series("step", "Optimiser steps done.", progress.step if progress else None)
    yield Series("steps_planned", "Optimiser steps in all.", progress.total_steps if progress else None)
    yield Series("epoch", "Epochs done.", progress.epoch if progress else None)
    yield Series("progress_ratio", "Share of the steps that is done.", progress.step / max(1, progress.total_steps) if progress else None)
    yield Series("tokens", "Tokens of examples that this attempt took steps on.", usage.trained_tokens if usage else None, "counter")
    yield Series(
        "heartbeat_timestamp_seconds", "When the workers last reported, Unix time.", _unix(progress.last_update_time) if progress else None
    )


def _measures(report: Report) -> Iterator[Series]:
    measured = {metric.name: metric.value for metric in report.metrics}
    yield Series("loss", "Training loss of the latest step, nats per token.", measured.get("train/loss"))
    yield Series("eval_loss", "Validation loss, nats per token.", measured.get("validation/loss"))
    yield Series("learning_rate", "Learning rate of the latest step.", measured.get("train/learningRate"))
    yield Series("grad_norm", "Norm of the gradients before clipping.", measured.get("train/gradNorm"))


def _paced(report: Report, workers: Workers) -> Iterator[Series]:
    pace = workers.pace
    rate = report.progress.tokens_per_second if report.progress else None
    yield Series("step_duration_seconds", "Time of the latest step, waiting for data included.", pace.step_seconds)
    yield Series("checkpoint_duration_seconds", "Time that saving the newest checkpoint took.", pace.checkpoint_seconds)
    yield Series(
        "checkpoint_last_success_timestamp_seconds",
        "When the newest checkpoint of this attempt was complete, Unix time.",
        _unix(pace.checkpoint_time),
    )
    yield Series("checkpoint_size_bytes", "Size of the newest checkpoint's tensors.", pace.checkpoint_bytes)
    yield Series("goodput_ratio", "Share of the time since this attempt's workers began that went into steps which count.", workers.goodput)
    yield Series(
        "mfu_ratio",
        "Floating point operations that the model needs, of those that the devices could do in bfloat16.",
        mfu(report.model, rate, workers.processes, pace.peak_flops),
    )
    yield Series("gpu_memory_peak_bytes", "Most bytes of its GPU that rank 0's tensors have taken.", pace.memory_peak_bytes)


def _unix(time: str | None) -> float | None:
    return datetime.fromisoformat(time).timestamp() if time else None
