"""Whose turn it is: a queue of keys, each worked on by one worker at a time, so that a job's reconciles never overlap.

A key that is added while it is worked on has another turn afterwards; one that waits already is not queued twice. Work that raises
has another turn after a wait that doubles each time, and that no event shortens.

Where more keys wait than can be worked on, what has happened to a job goes before what has only come due, and that before what is looked at
for safety's sake. None is put off for ever: each goes before what is added when its patience has run out.
"""

import asyncio
import itertools
import logging
import math
from collections.abc import Awaitable, Callable

from finetune_operator.port import ApiError, JobKey

BACKOFF_SECONDS = 1.0
"""Wait after the first error of a key."""
BACKOFF_MAX_SECONDS = 120.0
CLOCK_PATIENCE_SECONDS = 5.0
"""A turn whose time has come lets events of so many seconds go first."""
LISTED_PATIENCE_SECONDS = 60.0
"""So does one that is given to every job, because the jobs have been listed."""

log = logging.getLogger(__name__)

Work = Callable[[JobKey], Awaitable[float | None]]
"""One turn of a key; returns the seconds until its next turn, or None where only `add` brings one."""


def _wait_after(error: Exception, errors: int) -> float:
    """Seconds until the next turn. What the API server calls invalid stays that until somebody changes the CRD or the operator."""
    if isinstance(error, ApiError) and error.status == 422:
        return BACKOFF_MAX_SECONDS
    return min(BACKOFF_SECONDS * 2.0 ** min(errors - 1, 16), BACKOFF_MAX_SECONDS)


class Queue:
    """The keys that wait, now or for a later time. All methods belong to the thread of the event loop."""

    def __init__(self, work: Work, max_concurrent: int) -> None:
        self._work = work
        self._max_concurrent = max_concurrent
        self._ready: asyncio.PriorityQueue[tuple[float, int, JobKey]] = asyncio.PriorityQueue()
        """Keys by the time up to which they let others go first; of equal times the first that came."""
        self._waiting: dict[JobKey, float] = {}
        """That time of each key. An entry of `_ready` with another time is void: the key has gone before."""
        self._numbers = itertools.count()
        self._running: set[JobKey] = set()
        self._again: set[JobKey] = set()
        self._timers: dict[JobKey, asyncio.TimerHandle] = {}
        self._errors: dict[JobKey, int] = {}

    def __len__(self) -> int:
        """Keys that wait for a free worker."""
        return len(self._waiting)

    def add(self, key: JobKey, delay: float = 0.0, patience: float = 0.0) -> None:
        """Give the key a turn, `delay` seconds from now. Of several delays the shortest counts.

        Where others wait, it lets go first what is added in the next `patience` seconds with none. Of several the least counts.
        """
        if delay > 0:
            self._add_later(key, delay)
        # After an error even an event waits: it would find the same error.
        elif key not in self._errors or key not in self._timers:
            self._add_now(key, patience)

    def _add_now(self, key: JobKey, patience: float) -> None:
        if timer := self._timers.pop(key, None):
            timer.cancel()
        until = asyncio.get_running_loop().time() + patience
        if key in self._running:
            self._again.add(key)
        elif until < self._waiting.get(key, math.inf):
            self._waiting[key] = until
            self._ready.put_nowait((until, next(self._numbers), key))

    async def run(self) -> None:
        """Give turns until cancelled. Turns that are being taken then are cancelled too: work must be safe to cut short."""
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._max_concurrent):
                    workers.create_task(self._give_turns())
        finally:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()

    async def _give_turns(self) -> None:
        while True:
            until, _, key = await self._ready.get()
            if self._waiting.get(key) != until:
                continue
            del self._waiting[key]
            self._running.add(key)
            try:
                delay = await self._turn(key)
            finally:
                self._running.discard(key)
            again = key in self._again
            self._again.discard(key)
            if again and key not in self._errors:
                self.add(key)
            elif delay is not None:
                self.add(key, delay)

    async def _turn(self, key: JobKey) -> float | None:
        try:
            delay = await self._work(key)
        except Exception as error:  # whatever it was, it must not end the other jobs' turns
            errors = self._errors[key] = self._errors.get(key, 0) + 1
            delay = _wait_after(error, errors)
            # The server's words say all there is to say; a traceback is for defects.
            trace = not isinstance(error, ApiError)
            log.warning("%s/%s failed and is tried again in %g s: %s", key.namespace, key.name, delay, error, exc_info=trace)
            return delay
        self._errors.pop(key, None)
        return delay

    def _add_later(self, key: JobKey, delay: float) -> None:
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= loop.time() + delay:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_later(delay, self._add_now, key, CLOCK_PATIENCE_SECONDS)
