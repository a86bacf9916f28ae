"""What a person sees: the printer columns while the job moves, and a summary at its end."""

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_api.reasons import ADVICE, Reason
from finetune_api.status import Status
from finetune_operator.local.measured import measured

PERCENT_STEP = 5
_NUMBER = re.compile(r"[0-9]+([.,][0-9]+)*")
_STYLES = {"Complete": "green", "Failed": "red", "Suspended": "yellow"}


class View(Protocol):
    """Where the course of a job is shown."""

    def update(self, status: Status) -> None:
        """The job stands here now."""

    def note(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Nothing more moves."""


class Lines:
    """A line for each change that matters: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: tuple[str, ...] = ()

    def update(self, status: Status) -> None:
        """Print the columns, where more has changed than a number: progress counts in steps of PERCENT_STEP."""
        row = columns(status)
        percent = status.progress.percent if status.progress else 0
        change = (row[0], str(percent // PERCENT_STEP), _NUMBER.sub("", row[3]))
        if change != self._last:
            if not self._last:
                self._print(_line(("PHASE", "PROGRESS", "LOSS", "MESSAGE")))
            self._print(_line(row))
            self._last = change

    def note(self, text: str) -> None:
        """Print the text."""
        self._print(text)

    def close(self) -> None:
        """Nothing is held open."""

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class Screen:
    """The same columns in one place, with a bar: for a terminal."""

    def __init__(self, console: Console, name: str) -> None:
        self._name = name
        self._status = Status()
        self._begun = datetime.now(UTC)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
        self._live.start()

    def update(self, status: Status) -> None:
        """Show the status from now on."""
        self._status = status

    def note(self, text: str) -> None:
        """Print above the columns."""
        self._live.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._live.stop()

    def _render(self) -> RenderableType:
        status = self._status
        phase, progress, loss, message = columns(status)
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for title in ("NAME", "PHASE", "PROGRESS", "", "LOSS", "ATTEMPT", "AGE"):
            table.add_column(title, no_wrap=True)
        bar = ProgressBar(total=100, completed=status.progress.percent if status.progress else 0, width=24)
        age = duration((datetime.now(UTC) - self._begun).total_seconds())
        table.add_row(self._name, Text(phase, _STYLES.get(phase, "cyan")), progress, bar, loss, str(status.attempt.number or ""), age)
        return Group(table, Text(message, "dim", no_wrap=True, overflow="ellipsis"))


def columns(status: Status) -> tuple[str, str, str, str]:
    """Phase, progress, loss and message, as kubectl prints them."""
    loss = next((f"{metric.value:.4g}" for metric in status.metrics if metric.name == "train/loss"), "")
    message = next(iter((status.message or "").splitlines()), "")
    return status.phase or "Pending", f"{status.progress.percent}%" if status.progress else "", loss, message


def _line(row: tuple[str, ...]) -> str:
    phase, progress, loss, message = row
    return f"{phase:<12}{progress:<10}{loss:<9}{message}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as kubectl writes an age: 45s, 3m12s, 2h5m."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    if minutes == 0:
        return f"{rest}s"
    return f"{minutes}m{rest}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60}m"


def summary(name: str, status: Status, model_source: str, place: Callable[[str], Path | None]) -> Iterator[RenderableType]:
    """How a complete job went: before and after, where the results are, how to load them. `place` finds a URI on this machine."""
    took = f" after {duration(_seconds(status))}" if status.start_time and status.completion_time else ""
    trained = f" ({status.progress.step} steps, {status.progress.epoch:g} epochs)" if status.progress else ""
    yield Text(f"\n{name} is complete{took}{trained}.", "bold green")
    if any(condition.reason == Reason.BASELINE_SUFFICIENT for condition in status.conditions):
        yield Text(f"Nothing was trained: {status.message or 'a prompt alone is good enough'}")
    yield from measured(status, place)
    for artifact in status.artifacts:
        here = place(artifact.uri)
        yield Text(f"\n{artifact.kind}: {here or artifact.uri}  ({artifact.bytes / 1e6:.1f} MB)")
        if here is not None and artifact.kind == "adapter":
            base = place(model_source) or model_source.removeprefix("hf://")
            own = _IMPORT_OWN.format(adapter=str(here)) if (here / "bottleneck_adapter.py").exists() else ""
            yield Text(own + _LOAD_ADAPTER.format(base=str(base), adapter=str(here)), "dim")
        elif here is not None:
            yield Text(_LOAD_MODEL.format(model=str(here)), "dim")


_IMPORT_OWN = """\
  import sys
  sys.path.insert(0, {adapter!r})
  import bottleneck_adapter
"""
"""PEFT has no bottleneck adapters: their folders hold the file that adds them."""
_LOAD_ADAPTER = """\
  from peft import PeftModel
  from transformers import AutoModelForCausalLM
  model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})"""
_LOAD_MODEL = """\
  from transformers import AutoModelForCausalLM
  model = AutoModelForCausalLM.from_pretrained({model!r})"""


_IN_A_CLUSTER, _HERE = " and apply the job under a new name", ", and run it again"
"""What a job that failed needs: here it may keep its name."""


_JUDGED = (Reason.GATES_NOT_PASSED, Reason.GATES_INCONCLUSIVE)


def failure(
    name: str, status: Status, log: Path | None, tail: str, place: Callable[[str], Path | None] = lambda _: None
) -> Iterator[RenderableType]:
    """Why a job failed, what to change, and the last lines of the log; of a model that is not good enough, what was measured instead."""
    what = status.failure
    where = f" in {what.stage}" if what and what.stage else ""
    condition = next((condition for condition in status.conditions if condition.type == "Failed" and condition.status == "True"), None)
    reason = condition.reason if condition else what.reason if what else "unknown"
    last = f" ({what.reason})" if what and what.reason != reason else ""
    yield Text(f"\n{name} failed{where}: {reason}{last}", "bold red")
    told, cause = condition.message if condition else "", what.message if what else ""
    yield from (Text(f"  {message}") for message in (told, "" if cause in told else cause) if message)
    hint = (what.hint if what else None) or (ADVICE[Reason(reason)].hint if reason in set(Reason) else None)
    if hint:
        yield Text(f"  Hint: {hint.replace(_IN_A_CLUSTER, _HERE)}")
    if reason in _JUDGED:
        yield from measured(status, place)
        return
    if log is not None and log.exists():
        yield Text(f"  Log: {log}")
        yield Text("\n".join(f"    | {line}" for line in tail.splitlines()[-15:]), "dim")


def _seconds(status: Status) -> float:
    times = [datetime.fromisoformat(time) for time in (status.start_time, status.completion_time) if time]
    return (times[1] - times[0]).total_seconds() - status.suspended_seconds if len(times) == 2 else 0.0
