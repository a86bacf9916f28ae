"""What Linux says of a process: its memory and its CPU time."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Use:
    """Of one process, up to now."""

    resident: int
    """Bytes in memory."""
    peak: int
    """The most that it ever was."""
    cpu_seconds: float


def use_of(pid: int) -> Use:
    """Raises FileNotFoundError where there is no such process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(times[11]) + int(times[12])  # utime and stime, the 14th and 15th field of all
    return Use(_bytes(status["VmRSS"]), _bytes(status["VmHWM"]), ticks / os.sysconf("SC_CLK_TCK"))


def _bytes(text: str) -> int:
    number, unit = text.split()
    assert unit == "kB", text
    return int(number) * 1024
