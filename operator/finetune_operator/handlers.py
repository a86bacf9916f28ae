"""The informer: kopf watches jobs and their pods and says whose turn it is. With `watching`, the only kopf code.

Handlers of plain events leave nothing on the objects: no finalizer, no annotation, no status of their own.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kopf

from finetune_api import GROUP, LABEL_JOB_NAME, LABEL_JOB_UID, PLURAL, VERSION
from finetune_api.profile import PROFILE_PLURAL
from finetune_operator.port import JobKey
from finetune_operator.resting import has_ended_for_good, is_ended_head
from finetune_operator.watching import watch_settings

Wake = Callable[[JobKey, bool], None]
"""Puts a job on the queue; whether something has happened to it, or it has only been listed."""
Seen = Callable[[Mapping[str, Any], bool], None]
"""Told of each job as it is now, and whether it is gone."""
Watched = Callable[[str], None]
"""Told of each event's resource (finetunejobs, pods): the watch lives."""
Login = Callable[[], Awaitable[Mapping[str, Any]]]
"""Where and how to log in, as the arguments of kopf.ConnectionInfo."""


def informer_registry(wake: Wake, seen: Seen, login: Login, watched: Watched = lambda resource: None) -> kopf.OperatorRegistry:
    """The handlers, in a registry of their own, so that several can live in one process."""
    registry = kopf.OperatorRegistry()
    fingerprints: dict[str, bytes] = {}
    unbegun: dict[str, JobKey] = {}
    """Jobs by their UID that may wait for a profile."""

    async def on_login(**_: object) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(**await login())

    async def on_job(event: Mapping[str, Any], **_: object) -> None:
        job, gone = event["object"], event["type"] == "DELETED"
        watched(PLURAL)
        seen(job, gone)
        # Most events are the echo of the status that the loop has just written: it need not look again for those.
        uid, fingerprint = job["metadata"]["uid"], _without_status(job)
        key = JobKey(job["metadata"]["namespace"], job["metadata"]["name"])
        if gone or (job.get("status") or {}).get("attempt", {}).get("number", 0) > 0:
            unbegun.pop(uid, None)
        else:
            unbegun[uid] = key
        if gone:
            fingerprints.pop(uid, None)
        elif fingerprints.get(uid) == fingerprint:
            return
        else:
            fingerprints[uid] = fingerprint
        _tell(wake, key, event, has_ended_for_good)

    async def on_profile(event: Mapping[str, Any], **_: object) -> None:
        # What a job runs under is chosen once: a profile that comes or changes concerns those alone that have not begun.
        for key in tuple(unbegun.values()):
            wake(key, event["type"] is not None)

    async def on_pod(event: Mapping[str, Any], **_: object) -> None:
        meta = event["object"]["metadata"]
        watched("pods")
        if name := meta["labels"][LABEL_JOB_NAME]:  # a label may be empty, and anyone may set it
            _tell(wake, JobKey(meta["namespace"], name), event, is_ended_head)

    kopf.on.login(registry=registry, errors=kopf.ErrorsMode.TEMPORARY, backoff=5)(on_login)
    kopf.on.event(GROUP, VERSION, PLURAL, id="job", registry=registry)(on_job)
    kopf.on.event(GROUP, VERSION, PROFILE_PLURAL, id="profile", registry=registry)(on_profile)
    kopf.on.event("", "v1", "pods", labels=_OUR_PODS, id="pod", registry=registry)(on_pod)
    return registry


def _tell(wake: Wake, key: JobKey, event: Mapping[str, Any], rests: Callable[[Mapping[str, Any]], bool]) -> None:
    """Wake the job for whatever has happened; for what is only listed, where that does not rest.

    Whether anything is left of jobs that have ended is asked of all of them at once (see `survey`).
    """
    happened = event["type"] is not None
    if happened or not rests(event["object"]):
        wake(key, happened)


_OUR_PODS = {LABEL_JOB_UID: kopf.PRESENT, LABEL_JOB_NAME: kopf.PRESENT}


def _without_status(job: Mapping[str, Any]) -> bytes:
    """A digest of what a reconcile depends on beside the status: the spec's generation, labels, annotations, and whether the job is to go.

    A digest, since the annotations of a job may take up to 256 KiB.
    """
    kept = {name: job["metadata"].get(name) for name in ("generation", "deletionTimestamp", "labels", "annotations")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).digest()


class _Others(Collection[asyncio.Task[Any]]):
    """Every task of the loop that is not this informer's: at its end kopf stops all tasks but those that are named here.

    Those that were there before are others', and so are those that run no code of kopf's.
    """

    def __init__(self) -> None:
        self._before = asyncio.all_tasks()

    def __contains__(self, task: object) -> bool:
        code = getattr(task.get_coro(), "cr_code", None) if isinstance(task, asyncio.Task) else None
        return task in self._before or code is None or not Path(code.co_filename).is_relative_to(_KOPF)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return (task for task in asyncio.all_tasks() if task in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


_KOPF = Path(kopf.__file__).parent


async def start_informer(registry: kopf.OperatorRegistry, namespaces: Sequence[str]) -> Callable[[], Awaitable[None]]:
    """Begin to watch in these namespaces, or in all where none is named. What it returns runs until cancelled, or raises.

    kopf takes SIGTERM and SIGINT for itself while it starts: a caller that wants them asks for them after this. After what it returns has
    raised, nothing of this informer runs any more, and another one may be started.
    """
    logging.getLogger("kopf").setLevel(logging.WARNING)
    where: dict[str, Any] = {"namespaces": tuple(namespaces)} if namespaces else {"clusterwide": True}
    others = _Others()
    tasks = await kopf.spawn_tasks(registry=registry, settings=watch_settings(), standalone=True, **where)

    async def watch() -> None:
        await kopf.run_tasks(tasks, ignored=others)

    return watch
