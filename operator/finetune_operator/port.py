"""The port between the loop and the world: `cluster` implements it with a Kubernetes, `local` with this machine, tests with a fake."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from finetune_api.report import Report
from finetune_api.status import Status
from finetune_operator.observed import Pod


class JobKey(NamedTuple):
    """Which job."""

    namespace: str
    name: str


@dataclass(frozen=True)
class RawJob:
    """A job and what belongs to it, as the API server has them now."""

    job: dict[str, Any]
    pods: list[dict[str, Any]]
    config_maps: list[dict[str, Any]]
    """Metadata is enough."""
    events: list[dict[str, Any]]
    """core/v1 Events of the job's pods that are pending; empty where none is."""
    profiles: list[dict[str, Any]] = field(default_factory=list)
    """The TuningProfiles of the cluster, while the job has yet to be told under which one it runs."""
    looked: float | None = None
    """Seconds for which it has been read again and again by whoever answers; None where they are not counted."""


@dataclass(frozen=True)
class Event:
    """One transition, for `kubectl describe`."""

    name: str
    """Follows from what it tells, so that telling it again makes no second Event."""
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class ApiError(Exception):
    """The API server refused a request or did not answer. The message names verb, kind, object and the server's words."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; 0 where there was no answer."""
        self.reason = reason
        """The server's word for it (NotFound, Forbidden, ...)."""


class Conflict(Exception):  # noqa: N818 - a state of affairs that the loop reads as a value
    """The job has changed since it was read: read again."""


class TooLarge(Exception):  # noqa: N818 - as Conflict
    """The job has become larger than what the API server keeps."""


class Refused(Exception):  # noqa: N818 - as Conflict
    """The API server does not take an object: a quota, a policy or a permission (403, 422)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class Cluster(Protocol):
    """What the loop needs of the world. Every call is safe to repeat."""

    async def read(self, key: JobKey) -> RawJob | None:
        """The job, live, and its pods and ConfigMaps (by job-uid label); None where there is no such job."""

    async def fetch_report(self, pod: Pod, token: str, after: int, wait: float) -> Report | None:
        """What a head says; None where it cannot be reached or does not make sense. Waits `wait` seconds for a revision beyond `after`."""

    async def patch_status(self, job: dict[str, Any], status: Status) -> dict[str, Any]:
        """Write the status if the job still has the resourceVersion it was read with; the job as it is now.

        Raises Conflict, also where the job is gone, and TooLarge.
        """

    async def apply(self, manifest: dict[str, Any]) -> str:
        """Make the object, or bring it in line; its UID. A Secret that exists is left alone, and has none. Raises Refused and Conflict."""

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str | None = None, grace: int | None = None) -> None:
        """Delete the object if it is there, and has this uid where one is given, and in time what belongs to it.

        `grace` 0 does not wait for its node.
        """

    async def delete_pods(self, namespace: str, labels: Mapping[str, str], *, grace: int | None = None) -> None:
        """Delete every pod with these labels, with its own grace period or `grace` seconds."""

    async def delete_job(self, job: dict[str, Any]) -> None:
        """Delete the job that was read (its uid), and by ownership everything it made."""

    async def emit(self, job: dict[str, Any], event: Event) -> None:
        """Record an Event about the job; one of the same name is left alone, and a failure is not worth a retry."""
