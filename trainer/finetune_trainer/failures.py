"""From an exception to a Failure of the documented set, with a message that is fit to be shown."""

import errno
from collections.abc import Iterator

from finetune_api.reasons import ADVICE, Reason
from finetune_api.scrub import scrub, telling_lines
from finetune_api.status import Failure, StageName
from finetune_api.symptoms import CONSEQUENCES, recognise
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
    """What is wrong: the error itself or one that it wraps, where one says it; else what its type and its words say.

    When a worker fails the others lose it, or wait for it in vain: that is told only where nothing else is known.
    """
    chain = tuple(_causes(error))
    known = [cause for cause in chain if isinstance(cause, JobError)]
    known += [found for cause in chain if not isinstance(cause, JobError) and (found := _recognised(cause)) is not None]
    if root := next((found for found in known if found.reason not in CONSEQUENCES), None):
        return root
    if known:
        died = any(_is_death(cause) for cause in chain)
        return next((found for found in known if not died and found.reason != Reason.WORKERS_LOST), known[0])
    inner = next((cause for cause in chain if not type(cause).__module__.startswith("ray.")), error)
    return JobError(Reason.INTERNAL_ERROR, _last_line(inner))


_FINAL = (Reason.GPU_OUT_OF_MEMORY, Reason.GPU_HARDWARE_ERROR, Reason.GPU_UNAVAILABLE, Reason.STORAGE_FULL)
"""Another attempt may help, with other pods or more room; starting the workers again where they are does not."""


def is_final(error: BaseException) -> bool:
    """Whether starting the workers again cannot help: the job, its data, its memory or its nodes must change first."""
    reason = as_job_error(error).reason
    return not ADVICE[reason].retryable or reason in _FINAL


def _recognised(error: BaseException) -> JobError | None:
    """What another library's exception stands for. Known by its class's name and its words, so that no library is imported for it."""
    found = recognise(_lines(error))
    reason = _ERRNO.get(error.errno or 0) if isinstance(error, OSError) else None
    if found is None and reason is None:
        return JobError(Reason.WORKERS_LOST, _last_line(error)) if _is_death(error) else None
    bare = found is None or found.line.rstrip(": ") == _kind(error)
    return JobError(found.reason if found else reason or Reason.INTERNAL_ERROR, _last_line(error) if found is None or bare else found.line)


_ERRNO = {
    errno.ENOSPC: Reason.STORAGE_FULL,
    errno.EDQUOT: Reason.STORAGE_FULL,
    errno.ENOMEM: Reason.HOST_OUT_OF_MEMORY,
    errno.EROFS: Reason.STORAGE_UNAVAILABLE,
    errno.ESTALE: Reason.STORAGE_UNAVAILABLE,
    errno.EIO: Reason.STORAGE_UNAVAILABLE,
}


def _lines(error: BaseException) -> list[str]:
    """The error as a traceback ends in it. Of Ray's and torch's own words every line counts; others' go on with what may be anybody's."""
    first, *others = str(error).splitlines() or [""]
    return [f"{_kind(error)}: {first}", *(others if _kind(error).startswith(("ray.", "torch.")) else ())]


def _kind(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _is_death(error: BaseException) -> bool:
    """Whether it says that a worker is gone, and nothing of why."""
    return type(error).__module__.startswith("ray.") and type(error).__name__ in _WORKERS_LOST


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
