"""GPU-seconds, counted by the operator from the pods' own times: the head is a tenant's pod, and what it says of itself is no bill. Pure.

A pod holds its GPUs from when it was given a node until its containers have ended, whether it trains, waits for other workers or saves a
checkpoint on its way out. `usage.countedTime` says up to when all of that is in `usage.gpuSeconds`: both are written at once, so that a
crash counts nothing twice and leaves nothing out. A pod whose object has gone before its end was seen is counted up to countedTime.
"""

from collections.abc import Iterable
from datetime import datetime

from finetune_api.status import COUNT_MAX, Status, Usage
from finetune_operator.observed import Observed, Pod
from finetune_operator.settings import Settings
from finetune_operator.times import later, rfc3339


def with_gpu_seconds(status: Status, observed: Observed, now: datetime) -> Status:
    """The status with what its pods have held since countedTime; the same status where they held nothing."""
    usage = status.usage or Usage()
    since = later(usage.counted_time, 0) if usage.counted_time else None
    until = now.replace(microsecond=0)  # times of a status, and of pods, are whole seconds
    held = _held(observed.pods, since, until)
    if not held:
        return status
    counted = {"gpu_seconds": min(usage.gpu_seconds + held, float(COUNT_MAX)), "counted_time": rfc3339(until)}
    return status.model_copy(update={"usage": usage.model_copy(update=counted)})


def _held(pods: Iterable[Pod], since: datetime | None, until: datetime) -> float:
    """GPU-seconds of the pods between two times."""
    return sum(pod.gpus * _seconds(pod, since, until) for pod in pods if pod.gpus)


def _seconds(pod: Pod, since: datetime | None, until: datetime) -> float:
    """How long a pod held its node between two times. Of one that ended without saying when, nothing more is counted."""
    if pod.scheduled is None:
        return 0.0
    begin = pod.scheduled if since is None else max(pod.scheduled, since)
    end = until if not pod.finished else min(pod.ended or begin, until)
    return max((end - begin).total_seconds(), 0.0)


def usage_waits(before: Status, after: Status, settings: Settings, now: datetime) -> bool:
    """Whether nothing but GPU-seconds is new, and they need not be written yet: as progress, they are every `poll_seconds`."""
    known = before.usage
    if known is None or known.counted_time is None or after.usage == known:
        return False
    return now < later(known.counted_time, settings.poll_seconds) and after.model_copy(update={"usage": known}) == before
