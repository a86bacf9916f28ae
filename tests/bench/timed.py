"""The operator as it is, with each turn written down: `python -m tests.bench.timed`, BENCH_TURNS names the file.

Only the queue is another: it notes when a turn was due and why, and when it began and ended.
"""

import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TextIO

from tests.bench.turns import Cause, Turn

from finetune_operator import __main__ as operator
from finetune_operator.port import JobKey
from finetune_operator.queue import Queue, Work
from finetune_operator.settings import Settings

TURNS = "BENCH_TURNS"
"""Environment variable with the file's path."""


class TimedQueue(Queue):
    """A queue that writes its turns down."""

    def __init__(self, work: Work, max_concurrent: int, file: TextIO) -> None:
        super().__init__(self._timed, max_concurrent)
        self._timed_work = work
        self._file = file
        self._due: dict[JobKey, tuple[float, Cause]] = {}

    def add(self, key: JobKey, delay: float = 0.0, patience: float = 0.0) -> None:
        """Give the key a turn, and note since when it is due: the earliest of what it was added for."""
        due = time.monotonic() + max(delay, 0.0)
        if key not in self._due or due < self._due[key][0]:
            self._due[key] = (due, "time" if delay > 0 else "event")
        super().add(key, delay, patience)

    async def _timed(self, key: JobKey) -> float | None:
        begin = time.monotonic()
        due, cause = self._due.pop(key, (begin, "event"))
        try:
            return await self._timed_work(key)
        finally:
            self._file.write(Turn(f"{key.namespace}/{key.name}", cause, due, begin, time.monotonic()).line())


class TimedOperator(operator.Operator):
    """The operator, but for its queue."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        # Each line at once: the file is read meanwhile, and a process that is killed writes nothing more.
        file = Path(os.environ[TURNS]).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
        self.queue = TimedQueue(self._reconcile, settings.max_concurrent, file)
        self._turns = file

    def _give_turns(self, jobs: Mapping[str, JobKey], resting: Collection[str]) -> None:
        """Write down those too that are found to need no turn: at this moment they are done with."""
        super()._give_turns(jobs, resting)
        now = time.monotonic()
        for key in (jobs[uid] for uid in resting):
            self._turns.write(Turn(f"{key.namespace}/{key.name}", "event", now, now, now).line())


if __name__ == "__main__":
    operator.Operator = TimedOperator  # type: ignore[misc]
    operator.main()
