"""Lines for people: what `kubectl logs` of the head shows, and a progress bar where the output is a terminal."""

import sys
import time
from collections import deque
from typing import Any

from finetune_api.status import Progress

LINE_SECONDS = 5.0
LINES_KEPT = 40
"""Of what was said last: a failure is told with it."""


def progress_line(progress: Progress, metrics: dict[str, float]) -> str:
    """`step 120/600  loss 1.23  lr 1.8e-04  2,310 tok/s  eta 3 min`, without what is not known."""
    parts = [f"step {progress.step}/{progress.total_steps}"]
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.4g}")
    if "validation/loss" in metrics:
        parts.append(f"validation {metrics['validation/loss']:.4g}")
    if "train/learningRate" in metrics:
        parts.append(f"lr {metrics['train/learningRate']:.1e}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.eta_seconds is not None:
        parts.append(f"eta {duration(progress.eta_seconds)}")
    return "  ".join(parts)


def duration(seconds: int) -> str:
    """A time as people say it: `40 s`, `3 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Console:
    """Writes to standard output. Used by one thread at a time, but for `say`."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._last_line = 0.0
        self._said: deque[str] = deque(maxlen=LINES_KEPT)
        self._terminal = sys.stdout.isatty()

    @property
    def tail(self) -> str:
        """What was said last."""
        return "\n".join(self._said)

    def say(self, text: str) -> None:
        """One line."""
        self._said.append(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)  # noqa: T201

    def progress(self, progress: Progress, metrics: dict[str, float]) -> None:
        """How far the training is: a line every few seconds and at the end, or a bar."""
        line = progress_line(progress, metrics)
        if self._terminal:
            self._update_bar(progress, line)
        elif time.monotonic() - self._last_line > LINE_SECONDS or progress.step == progress.total_steps:
            self._last_line = time.monotonic()
            self.say(line)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _update_bar(self, progress: Progress, line: str) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(BarColumn(), TextColumn("{task.description}"))
            self._bar.start()
            self._task = self._bar.add_task("", total=progress.total_steps)
        self._bar.update(self._task, completed=progress.step, description=line)
