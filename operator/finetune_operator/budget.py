"""What keeps a job from running although nothing is wrong with it: its user wants it suspended, or its GPU-hours are used up. Pure."""

from dataclasses import dataclass, replace

from finetune_api.reasons import Reason
from finetune_api.status import Status
from finetune_api.v1alpha1 import Spec
from finetune_operator.look import Look

SECONDS_PER_HOUR = 3600


def used_up(spec: Spec, status: Status) -> bool:
    """Whether the job has used its GPU-hours."""
    limit, usage = spec.max_gpu_hours, status.usage
    return limit is not None and usage is not None and usage.gpu_seconds >= limit * SECONDS_PER_HOUR


@dataclass(frozen=True)
class Hold:
    """Why the pods are to go, and to stay away."""

    reason: Reason
    going: str
    """While they go."""
    gone: str
    """When they have gone: what brings them back."""


_SUSPENDED = Hold(
    Reason.SUSPENDED, "suspending: the pods save a checkpoint, then go", "set spec.suspend to false to go on from the last checkpoint"
)
_SUSPENDED_HERE = replace(_SUSPENDED, gone="nothing of it runs any more")
"""On this machine the command that ran the job brings it back, and says so itself."""


def hold_of(look: Look) -> Hold | None:
    """What keeps the job from running now; None where nothing does.

    A stage that asks for no workers may come to its end on a used-up budget: it holds no GPU, and it may be the one that publishes.
    """
    if look.spec.suspend:
        return _SUSPENDED_HERE if look.settings.local else _SUSPENDED
    if look.attempt.running and not look.status.workers_wanted:
        return None
    if not used_up(look.spec, look.status):
        return None
    # No figure that goes on rising: words of a condition change when the state does.
    why = f"maxGpuHours ({look.spec.max_gpu_hours:g}) is used up"
    return Hold(
        Reason.BUDGET_EXCEEDED,
        f"{why}: the pods save a checkpoint, then go",
        f"{why}: raise or remove spec.maxGpuHours to go on from the last checkpoint",
    )
