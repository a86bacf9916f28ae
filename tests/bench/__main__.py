"""Measure and print: training beside TRL, preparing data, retrieval, answering, kept answers, API requests of a job, many lives, many jobs.

python -m tests.bench                        # all
python -m tests.bench training --pairs 5     # one of them
"""

import argparse
import asyncio
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from tests.bench import control_plane, data, distillation, generation, retrieval, scale, training
from tests.integration.api.apiserver import NoApiServerError

PARTS = ("training", "data", "retrieval", "generation", "distillation", "life", "lives", "jobs")


def main() -> None:
    """Run the parts that were asked for, and say plainly what was left out."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=3, help="training: runs of each variant, taken in turn (default: %(default)s)")
    parser.add_argument("--size", choices=tuple(training.SUBJECTS), help="training: the model (default: small, or 0.5B on a GPU)")
    parser.add_argument("--clock", choices=tuple(training.CLOCKS), default="wall", help="training: cpu where the machine has other work")
    parser.add_argument("--encoder", type=Path, help="retrieval: folder of an encoder (default: one of random weights, for its speed)")
    parser.add_argument("--lives", type=int, default=100, help="lives: jobs that live from creation to Complete (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, nargs="+", default=[1000, 5000], help="jobs: how many exist, one size after the other (default: 1000 5000)"
    )
    parser.add_argument("--training", type=float, default=10, help="jobs: percent of them that train (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    parts = arguments.parts or list(PARTS)
    # Ended however it may be, no API server is left behind. A shell begins what is to run beside it with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        if "training" in parts:
            console.print(training.compare(arguments.pairs, Path(folder) / "training", arguments.size, arguments.clock))
        if "data" in parts:
            console.print(data.prepare(Path(folder) / "data"))
        if "retrieval" in parts:
            console.print(retrieval.compare(Path(folder) / "retrieval", arguments.encoder))
        if "generation" in parts:
            console.print(generation.answer(Path(folder) / "generation"))
        if "distillation" in parts:
            console.print(distillation.compare(Path(folder) / "distillation"))
        try:
            _operator(console, Path(folder), parts, arguments)
        except NoApiServerError as error:
            console.print(f"left out: the operator's figures, since there is {error}", style="yellow")


def _operator(console: Console, folder: Path, parts: Sequence[str], arguments: argparse.Namespace) -> None:
    """The parts that need an API server. Raises NoApiServerError."""
    if "life" in parts:
        console.print(asyncio.run(control_plane.one_life(folder / "life")))
    if "lives" in parts:
        console.print(asyncio.run(control_plane.many_lives(folder / "lives", arguments.lives)))
    if "jobs" in parts:
        asyncio.run(_jobs(console, folder / "jobs", arguments))


async def _jobs(console: Console, folder: Path, arguments: argparse.Namespace) -> None:
    async for table in scale.many_jobs(folder, arguments.jobs, arguments.training):
        console.print(table)


if __name__ == "__main__":
    main()
