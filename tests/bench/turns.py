"""What an operator did when: the turns that it writes down, and exact percentiles of them.

Times are of CLOCK_MONOTONIC, which processes share.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Cause = Literal["event", "time"]
"""Something happened to the job, or the time had come that its last turn named."""


@dataclass(frozen=True)
class Turn:
    """One turn of one job."""

    job: str
    """namespace/name."""
    cause: Cause
    due: float
    """When the process heard of the event, or the time that was named."""
    begin: float
    end: float

    def line(self) -> str:
        """As it is written down."""
        return f"{self.job} {self.cause} {self.due} {self.begin} {self.end}\n"


@dataclass(frozen=True)
class Touch:
    """A change that somebody made to a job."""

    job: str
    at: float
    """When it was sent to the API server."""


def turns_in(path: Path) -> list[Turn]:
    """The turns that have been written down so far, in order of their ends."""
    if not path.exists():
        return []
    turns = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # else it is being written
            job, cause, due, begin, end = line.split()
            turns.append(Turn(job, "event" if cause == "event" else "time", float(due), float(begin), float(end)))
    return turns


def first_ends(turns: Iterable[Turn]) -> dict[str, float]:
    """When each job's first turn ended."""
    ends: dict[str, float] = {}
    for turn in turns:
        ends[turn.job] = min(turn.end, ends.get(turn.job, math.inf))
    return ends


def answered(touches: Iterable[Touch], turns: Iterable[Turn]) -> list[float]:
    """Seconds from each change to the end of the first turn of that job that began after it; infinite where none did.

    A turn that began before the change was sent cannot have seen it; each turn reads the job anew, so any later one has.
    """
    of: defaultdict[str, list[Turn]] = defaultdict(list)
    for turn in sorted(turns, key=lambda turn: turn.begin):
        of[turn.job].append(turn)
    seconds = []
    for touch in touches:
        after = of[touch.job][bisect_left(of[touch.job], touch.at, key=lambda turn: turn.begin) :]
        seconds.append(after[0].end - touch.at if after else math.inf)
    return seconds


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of the values do not exceed (nearest rank); NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def in_both(seconds: Sequence[float]) -> str:
    """The 50th and the 99th percentile, in milliseconds; a dash for none."""
    return f"{1000 * percentile(seconds, 50):.0f} ms; {1000 * percentile(seconds, 99):.0f} ms" if seconds else "-"
