"""How fast the workers are, and how much of the time that was held went into the training: for /metrics alone, not for the status."""

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field

from finetune_api.fields import StatusModel
from finetune_api.status import Count, ModelSummary, Time


class Pace(StatusModel):
    """What rank 0 has measured in its group. Absent is not known, or not yet."""

    step_seconds: float | None = Field(default=None, ge=0)
    """Time of the newest step, waiting for the data and for the other workers included."""
    stepping_seconds: float = Field(default=0.0, ge=0)
    """Time of all steps of this group."""
    checkpoint_seconds: float | None = Field(default=None, ge=0)
    """Time of the newest checkpoint."""
    checkpoint_bytes: Count | None = None
    """Size of its tensors."""
    checkpoint_time: Time | None = None
    """When it was complete."""
    memory_peak_bytes: Count | None = None
    """Most bytes of the GPU's memory that tensors have taken."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Floating point operations per second that the device could do at best."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """What saving a checkpoint took."""

    seconds: float
    bytes: int


class Goodput:
    """The share of the time since the attempt's workers were first heard of that went into steps which count."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self._begun: float | None = None
        self._group: str | None = None
        self._earlier = 0.0
        """Seconds of earlier groups' steps that were not lost."""
        self._start = self._step = 0
        self._stepping = 0.0

    def take(self, group: str, start_step: int, step: int, stepping_seconds: float) -> None:
        """Take a group's newest word: the step that it went on from, the step that it is at, and the time of its steps."""
        if self._begun is None:
            self._begun = self._clock()
        if group != self._group:
            done = self._step - self._start
            kept = max(0, min(start_step, self._step) - self._start)
            self._earlier += self._stepping * kept / done if done > 0 else 0.0
            self._group, self._start = group, start_step
        self._step, self._stepping = step, stepping_seconds

    @property
    def ratio(self) -> float | None:
        """Between 0 and 1; None before any worker was heard of."""
        if self._begun is None:
            return None
        held = self._clock() - self._begun + 1e-9
        return min(1.0, (self._earlier + self._stepping) / held)


def mfu(model: ModelSummary | None, tokens_per_second: float | None, processes: int, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation: what the training needs of its devices' best, recomputed activations not counted. None where not known.

    A token costs 2 operations per parameter in the forward pass, 2 for the gradient of what it computes, and 2 for each parameter
    that is trained (Chowdhery et al., 2022, appendix B, without the attention's own part; 6 per parameter where all are trained).
    """
    if model is None or not model.parameters or not tokens_per_second or not processes or not peak_flops:
        return None
    return tokens_per_second * (4 * model.parameters + 2 * model.trained_parameters) / (processes * peak_flops)
