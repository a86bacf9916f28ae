"""The part of a status that tells how the published model does on fresh data."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.fields import StatusModel
from finetune_api.schedule import SCHEDULE_MAX
from finetune_api.status_fields import Count, MeasureName, Name, Text, Time

FRESH_MAX = 240
"""All metrics of as many suites as a spec may hold."""


class FreshFigure(StatusModel):
    """One metric of the published model on fresh data, as the trainer reports it."""

    metric: MeasureName
    """Name as suite/metric."""
    value: float | None = None
    """The value; absent where no example has one."""
    low: float | None = None
    """Lower end of its confidence interval."""
    high: float | None = None
    """Upper end of its confidence interval."""
    n: Count | None = None
    """Examples that it was measured on."""


class MonitoredResult(FreshFigure):
    """One metric of the published model on fresh data, beside the figure that it was released with."""

    released: float | None = None
    """The value in evaluation.results."""
    difference: float | None = None
    """The fresh value less the released one."""
    verdict: Literal["Held", "Degraded", "Inconclusive"] | None = None
    """Degraded: the whole interval is worse than the released figure by more than degradedIf allows; Inconclusive: the value is, and a
    part of its interval is not; absent where the metric is not judged."""


class RunFailure(StatusModel):
    """Why the last run gave no figures."""

    reason: Annotated[str, Field(max_length=64)]
    """Why, as one word of the documented set."""
    message: Text = ""
    """Why, for people."""
    hint: Text | None = None
    """What to change."""
    pod: Name | None = None
    """Pod that it happened in."""


class MonitoringRun(StatusModel):
    """One measuring run: a set of pods of its own, after the job's attempts."""

    number: Count
    """Number of the run, which its pods are named by; it goes on from that of the last attempt."""
    start_time: Time | None = None
    """When it began."""
    end_time: Time | None = None
    """When it ended, or was told to."""
    active_time: Time | None = None
    """Since when no queue has held it back, from which its deadline counts; absent while one does."""
    waiting_time: Time | None = None
    """Since when it has waited for pods to run."""
    head_seen: bool = False
    """Whether its head pod was seen, so that its absence means that it is lost."""
    workers_wanted: Count = 0
    """Worker pods that it has asked for."""

    @property
    def running(self) -> bool:
        """Whether its objects should exist."""
        return self.end_time is None


class MonitoringStatus(StatusModel):
    """How the published model does on fresh data."""

    runs: Count = 0
    """Runs that gave figures."""
    failed_runs: Count = 0
    """Runs that did not."""
    schedule: Annotated[str, Field(max_length=SCHEDULE_MAX)] = ""
    """The schedule that nextRunTime follows from."""
    next_run_time: Time | None = None
    """When the next run begins; absent while one is under way, while spec.suspend is set, and while maxGpuHours are used up."""
    last_run_time: Time | None = None
    """When the last run ended."""
    run: MonitoringRun | None = None
    """The run that is under way, or the last one."""
    results: Annotated[tuple[MonitoredResult, ...], Field(max_length=FRESH_MAX)] = ()
    """What the last run that gave figures has measured."""
    message: Text = ""
    """Summary for people."""
    failure: RunFailure | None = None
    """Why the last run gave no figures; absent where it did."""
