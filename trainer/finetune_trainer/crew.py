"""The workers of an attempt: waited for, given work, followed, and asked again when they were taken away from it."""

import itertools
import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from finetune_api.reasons import Reason
from finetune_trainer.attempt import Attempt
from finetune_trainer.errors import JobError
from finetune_trainer.failures import as_job_error, is_final
from finetune_trainer.interruption import InterruptedRunError, Interruption
from finetune_trainer.ray_cluster import Growth, driver, gpus_of, processes_of, wait_for_workers

KEEP_SECONDS = 10.0
"""How often the report is left in the storage while workers work."""
MAX_FRUITLESS = 20
"""Times in a row that the workers may leave without having got further, because one of them is taken away."""
STOP_SECONDS = 55.0
"""After a call to stop, the workers have so long to save a checkpoint; the operator's grace period is longer."""
QUEUE_LABELS = "kueue.x-k8s.io/"
"""Labels of a job whose pods a queue may hold back, begin so."""

Found = TypeVar("Found")
Work = Callable[[str, int], None]
"""What a group of workers does, to its end: called with a name that no other group has, and with the number of worker nodes."""


class Crew:
    """The workers of an attempt. A context: from the first work to its end this process is Ray's driver."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._open = ExitStack()
        self._groups = itertools.count(1)
        self._joined = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def run(self, work: Work, done: Callable[[], Found | None], moved: Callable[[], int] = int, *, grows: bool = False) -> Found:
        """Have workers do something until `done` finds what was wanted.

        `moved` says how far it is: workers that leave, or are lost, again and again without getting further end the attempt. With `grows`
        the work can be interrupted, to go on with more workers. Raises InterruptedRunError once all is saved, and what the work raises.
        """
        attempt, compute = self._attempt, self._attempt.job.spec.compute
        self._join()
        fruitless = 0
        while fruitless < MAX_FRUITLESS:
            attempt.interruption.at_once = True  # the group before has saved what it did, and the next one has done nothing yet
            attempt.interruption.check()
            nodes = wait_for_workers(compute, self._patience, self._tell_joined)
            attempt.following.workers_joined(nodes * processes_of(compute), on_gpus=gpus_of(compute) > 0)
            before = moved()
            name = f"attempt-{attempt.environment.attempt}-{next(self._groups)}"
            try:
                why = self._follow(_Background(partial(work, name, nodes)), grows=grows)
            except Exception as error:
                if as_job_error(error).reason != Reason.WORKERS_LOST or moved() <= before:
                    raise
                why = "workers were lost again and again; going on from what they have done"
            found = done()
            if found is not None:
                attempt.interruption.at_once = True
                return found
            attempt.interruption.check()
            attempt.console.say(why)
            fruitless = 0 if moved() > before else fruitless + 1
        raise JobError(Reason.WORKERS_LOST, f"workers were taken away {MAX_FRUITLESS} times before they had got any further")

    @property
    def _patience(self) -> float:
        """Seconds in which workers must join. Where a queue holds them back the operator alone keeps that time, which knows of it."""
        job = self._attempt.job
        queued = any(label.startswith(QUEUE_LABELS) for label in job.metadata.labels)
        return math.inf if queued else job.spec.pre_running_deadline_seconds

    def _join(self) -> None:
        if self._joined:
            return
        self._attempt.ray_head.wait_ready()
        self._open.enter_context(driver(self._attempt.environment))
        self._attempt.interruption.listen()
        self._joined = True

    def _tell_joined(self, joined: int) -> None:
        self._attempt.console.say(f"{joined} of {self._attempt.job.spec.compute.workers.max} workers have joined")

    def _follow(self, working: "_Background", *, grows: bool) -> str:
        """Until the workers have left. Returns why, if it is not that they have come to the end. Raises what they raised."""
        following, growth = self._attempt.following, Growth(self._attempt.job.spec.compute)
        grown = False

        def look() -> None:
            nonlocal grown
            self._attempt.keep_report()
            following.look()
            following.regroup = grows and growth.is_due(following.processes)
            grown = grown or following.regroup

        try:
            working.wait(self._attempt.interruption, _Periodically(KEEP_SECONDS, look))
        finally:
            following.workers_released()
        if grown:
            return "more workers have joined; going on with all of them"
        return "a worker is taken away; going on as soon as there are enough again"


class _Periodically:
    """A call that is made at most once in so many seconds."""

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self._seconds, self._call, self._last = seconds, call, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._call()


class _Background:
    """A call in a thread of its own, so that this one can hear a call to stop."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, name="work", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def wait(self, interruption: Interruption, meanwhile: Callable[[], None]) -> None:
        """Until the call returns; after a call to stop no longer than STOP_SECONDS.

        Raises what the call raised, and InterruptedRunError where it was stopped.
        """
        asked: float | None = None
        while self._thread.is_alive():
            self._thread.join(timeout=0.2)
            meanwhile()
            if interruption.requested:
                asked = asked or time.monotonic()
                if time.monotonic() - asked > STOP_SECONDS:
                    raise InterruptedRunError
        if self._error is not None:
            if interruption.requested and not is_final(self._error):
                raise InterruptedRunError from self._error
            raise self._error
