"""One look at a job, and the statuses that tests of the lifecycle begin with."""

from dataclasses import replace
from datetime import datetime

from tests.builders import SETTINGS, T0, at, make_job, make_pod, make_report, terminated

from finetune_api.status import Progress, Status
from finetune_operator.lifecycle import advance
from finetune_operator.observed import Observed, Pod, Waiting


def step(before: Status, *pods: Pod, report=None, now: datetime = T0, refusal: Waiting | None = None, **spec) -> Status:
    """The status after one look; a second look at the same changes nothing."""
    observed = Observed(tuple(pods), frozenset({1}), report, refusal)
    job = make_job(status=before, **spec)
    after = advance(job, observed, SETTINGS, now)
    assert advance(replace(job, status=after), observed, SETTINGS, now) == after
    return after


def condition(status: Status, kind) -> tuple[str, str]:
    found = status.condition(kind)
    assert found is not None
    return found.status, found.reason


HEAD, PENDING_HEAD = make_pod(), make_pod(phase="Pending")
WORKERS = (make_pod("worker", index=0), make_pod("worker", index=1))
BEGUN = step(Status())
PREPARING = step(BEGUN, HEAD, report=make_report("Prepare"), now=at(10))
TRAINING = step(PREPARING, HEAD, *WORKERS, report=make_report("Train", progress=Progress(step=5, total_steps=10, percent=50)))


def ended(code: int = 1, reason: str = "Error", message: str = "", **status) -> Pod:
    return make_pod(phase="Succeeded" if code == 0 else "Failed", containerStatuses=terminated(code, reason, message), **status)
