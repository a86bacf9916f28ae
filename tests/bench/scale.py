"""The operator and a bare kopf handler with many jobs that exist already: cold start, memory, latencies, writes.

benchmarks/RESULTS.md says what each figure is.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from tests.bench.bare_kopf import TOUCH
from tests.bench.control_plane import AS_IN_PRODUCTION, stage_in, writes_of
from tests.bench.fleet import Fleet, make_fleet
from tests.bench.processes import Use, use_of
from tests.bench.reporting import Heads
from tests.bench.turns import Touch, Turn, answered, first_ends, in_both, turns_in
from tests.integration.api.kube import Kube
from tests.integration.api.operators import Operator
from tests.integration.api.stages import Stage

COLD_START_SECONDS = 900
"""When a cold start that does not end is given up."""
SETTLING_SECONDS = 15
"""After a cold start, before the window begins: each job that trains has had a turn by the clock."""
WINDOW_SECONDS = 60
TOUCHES_PER_SECOND = 10
OPERATOR, BARE = "this operator", "bare kopf handler"
MODULES = {OPERATOR: "tests.bench.timed", BARE: "tests.bench.bare_kopf"}


@dataclass(frozen=True)
class Figures:
    """Of one process with one fleet."""

    cold_start: float
    """Seconds from the start of the process until every job has had a turn, or was found to need none."""
    cold: Use
    """At that moment."""
    end: Use
    cpu_share: float
    """Of one core, in the window."""
    turns: tuple[Turn, ...]
    """Those that began in the window."""
    events: tuple[float, ...]
    """Seconds from each change of a job to the end of its turn."""
    writes: float | None
    """Requests of the operator's in the window that change something; None where nobody counts them."""


async def many_jobs(folder: Path, sizes: Sequence[int], training_percent: float) -> AsyncIterator[Table]:
    """A table for each size, each at an API server of its own."""
    for size in sizes:
        training = round(size * training_percent / 100)
        async with stage_in(folder / str(size)) as (_, stage), Heads(stage.report_port).serving() as heads:
            fleet = await make_fleet(stage, heads, size, training)
            # The bare handler comes last: it writes into the statuses.
            figures = {name: await _measured(stage, fleet, name) for name in (OPERATOR, BARE)}
        yield _table(figures, fleet)


async def _measured(stage: Stage, fleet: Fleet, name: str) -> Figures:
    """Start the process, wait until it has seen every job, and change jobs while it is watched."""
    written = stage.folder / f"{MODULES[name]}.turns"
    process = stage.operator(
        stage.server.admin_kubeconfig,
        **AS_IN_PRODUCTION,
        FINETUNE_WATCH_NAMESPACES="",
        FINETUNE_LOG_LEVEL="WARNING",
        BENCH_TURNS=str(written),
    )
    process.module = MODULES[name]
    begun = time.monotonic()
    async with process.running():
        assert process.process is not None
        pid = process.process.pid
        await _until_all_had_a_turn(process, fleet, written)
        cold_start, cold = max(first_ends(turns_in(written)).values()) - begun, use_of(pid)
        print(f"{name}: every one of {len(fleet.jobs)} jobs has had a turn after {cold_start:.1f} s", flush=True)
        await asyncio.sleep(SETTLING_SECONDS)
        before, writes, since = use_of(pid), await _counted(process, name), time.monotonic()
        touches = await _touch(stage.kube, fleet, name)
        until, end, after = time.monotonic(), use_of(pid), await _counted(process, name)
        await asyncio.sleep(5)  # the last changes' turns
        turns = turns_in(written)
    return Figures(
        cold_start=cold_start,
        cold=cold,
        end=end,
        cpu_share=(end.cpu_seconds - before.cpu_seconds) / (until - since),
        turns=tuple(turn for turn in turns if since <= turn.begin < until),
        events=tuple(answered(touches, turns)),
        writes=None if after is None or writes is None else (after - writes) * 60 / (until - since),
    )


async def _until_all_had_a_turn(process: Operator, fleet: Fleet, written: Path) -> None:
    async with asyncio.timeout(COLD_START_SECONDS):
        while not set(fleet.jobs) <= first_ends(turns_in(written)).keys():
            process.check_alive()
            await asyncio.sleep(1)


async def _touch(kube: Kube, fleet: Fleet, process: str) -> list[Touch]:
    """Change an annotation of jobs drawn at random, at an even pace; never of one job twice at a time.

    To a value that no other process's turn has left there: what changes nothing wakes nobody.
    """
    drawn = random.Random(0).sample(fleet.jobs, len(fleet.jobs))  # noqa: S311 - not a secret
    begun, touches = time.monotonic(), []
    async with asyncio.TaskGroup() as group:
        for number, job in zip(range(WINDOW_SECONDS * TOUCHES_PER_SECOND), itertools.cycle(drawn), strict=False):
            await asyncio.sleep(max(0.0, begun + number / TOUCHES_PER_SECOND - time.monotonic()))
            namespace, name = job.split("/")
            touches.append(Touch(job, time.monotonic()))
            change = {"metadata": {"annotations": {TOUCH: f"{process} {number}"}}}
            group.create_task(kube.patch("FineTuneJob", namespace, name, change))
    return touches


async def _counted(process: Operator, name: str) -> float | None:
    return None if name == BARE else await writes_of(process)


def _table(figures: dict[str, Figures], fleet: Fleet) -> Table:
    """The figures side by side."""
    title = f"{len(fleet.jobs)} jobs that exist: {len(fleet.training)} train and tell of a step at each look, the others are complete"
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for name in figures:
        table.add_column(name, justify="right")
    rows = {
        "cold start: from the start of the process until each job has had its turn, or was found to need none": lambda f: (
            f"{f.cold_start:.1f} s"
        ),
        "CPU time up to then": lambda f: f"{f.cold.cpu_seconds:.1f} s",
        "memory then": lambda f: f"{f.cold.resident / 2**20:.0f} MiB",
        "memory, peak over all": lambda f: f"{f.end.peak / 2**20:.0f} MiB",
        "from a change of a job to the end of its turn, p50; p99": lambda f: in_both(f.events),
        "changes; of them without a turn": lambda f: f"{len(f.events)}; {f.events.count(math.inf)}",
        "from when a turn by the clock was due to its end, p50; p99": lambda f: in_both(
            [t.end - t.due for t in f.turns if t.cause == "time"]
        ),
        "a turn, from its begin to its end, p50; p99": lambda f: in_both([t.end - t.begin for t in f.turns]),
        "turns a second": lambda f: f"{len(f.turns) / WINDOW_SECONDS:.1f}",
        "CPU, of one core": lambda f: f"{f.cpu_share:.0%}",
        "writes a minute, for each job that trains": lambda f: _per(f.writes, len(fleet.training)),
    }
    for figure, read in rows.items():
        table.add_row(figure, *map(read, figures.values()))
    return table


def _per(writes: float | None, jobs: int) -> str:
    return "-" if writes is None or not jobs else f"{writes / jobs:.1f}"
