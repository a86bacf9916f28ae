"""From an exception to a Failure of the documented set, with a message that is fit to be shown."""

import errno
from collections.abc import Iterator

from finetune_api.reasons import ADVICE, Reason
from finetune_api.scrub import scrub, telling_lines
from finetune_api.status import Failure, StageName
from finetune_trainer.errors import JobError

MESSAGE_LIMIT = 1000
"""Characters of a failure's message; the API allows 1024."""


def failure_from(error: BaseException, stage: StageName | None) -> Failure:
    """What to tell the user about an exception that ended the attempt."""
    job_error = as_job_error(error)
    advice = ADVICE[job_error.reason]
    return Failure(
        stage=stage,
        reason=job_error.reason,
        message=_shortened(scrub(job_error.message)),
        hint=advice.hint,
        retryable=advice.retryable,
    )


def as_job_error(error: BaseException) -> JobError:
    """What is wrong: the error itself or one that it wraps, where one says it; else what its type says.

    When a worker fails the others lose it: that is told only where nothing else is known.
    """
    chain = tuple(_causes(error))
    known = [cause for cause in chain if isinstance(cause, JobError)]
    known += [JobError(reason, _last_line(cause)) for cause in chain if (reason := _reason(cause)) is not None]
    if known:
        return next((found for found in known if found.reason != Reason.WORKERS_LOST), known[0])
    inner = next((cause for cause in chain if not type(cause).__module__.startswith("ray.")), error)
    return JobError(Reason.INTERNAL_ERROR, _last_line(inner))


def is_final(error: BaseException) -> bool:
    """Whether starting the workers again cannot help: the job, its data or its memory must change first."""
    reason = as_job_error(error).reason
    return not ADVICE[reason].retryable or reason in (Reason.GPU_OUT_OF_MEMORY, Reason.STORAGE_FULL)


def _reason(error: BaseException) -> Reason | None:
    """The reason that another library's exception stands for. Known by its class's name, so that no library is imported for it."""
    kind = f"{type(error).__module__}.{type(error).__name__}"
    if kind.startswith("torch.") and kind.endswith("OutOfMemoryError"):
        return Reason.GPU_OUT_OF_MEMORY
    if kind == "ray.exceptions.OutOfMemoryError" or isinstance(error, MemoryError):
        return Reason.OUT_OF_MEMORY
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or any(words in str(error) for words in _FULL):
        return Reason.STORAGE_FULL
    if kind.startswith("ray.") and type(error).__name__ in _WORKERS_LOST:
        return Reason.WORKERS_LOST
    return None


_FULL = ("No space left on device", "Disk quota exceeded")
_WORKERS_LOST = (
    "RayActorError",
    "ActorDiedError",
    "ActorUnavailableError",
    "WorkerCrashedError",
    "NodeDiedError",
    "PreemptionError",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, those it wraps (Ray's errors hold the workers' own), and those that it was raised from."""
    waiting, seen = [error], set[int]()
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += list(getattr(current, "worker_failures", {}).values())
        waiting += [
            getattr(current, name, None)
            for name in ("controller_failure", "health_check_failure", "_base_exc", "cause", "__cause__", "__context__")
        ]
        waiting = [item for item in waiting if isinstance(item, BaseException)]


def _last_line(error: BaseException) -> str:
    lines = telling_lines(str(error))
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


def _shortened(text: str) -> str:
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"
