"""Processes in place of containers: started in a session of their own, known again by a mark, ended with all their children.

A container ends with its first process; on this machine the rest must be looked for. Ray's daemons inherit the mark through the
environment, but some of them overwrite their environment with a title: those are known by their session, or by their parent.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

MARK = "FINETUNE_POD"
"""Environment variable that every process of a pod carries; its value is drawn for each start, so no stranger has it."""

EXIT_NOT_STARTED = 127
_SAME_START_SECONDS = 0.5
_SWEEPS, _SWEEP_SECONDS = 100, 0.05


@dataclass(frozen=True)
class Mark:
    """What a later run knows a pod's processes by."""

    value: str
    pid: int = 0
    """First process, and the session of all that it started; 0 before the start."""
    started: float = 0.0
    """When the first process started, in seconds since 1970: tells it from a later one with its number."""

    def to_json(self) -> dict[str, Any]:
        """The plain JSON object."""
        return asdict(self)


def mark_from(raw: Mapping[str, Any]) -> Mark | None:
    """The mark in a JSON object, or None where it is not one."""
    try:
        return Mark(str(raw["value"]), int(raw["pid"]), float(raw["started"]))
    except (KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Started:
    """A process that this program started, so that it learns the exit code."""

    process: asyncio.subprocess.Process
    mark: Mark


def new_mark() -> Mark:
    """A mark to write down before the start, so that a process is found even where this program is killed right after starting it."""
    return Mark(secrets.token_hex(16))


async def start(command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path, mark: Mark) -> Started:
    """Start a command in a session of its own; output goes to the end of `log`. Raises OSError where it cannot be started."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**env, MARK: mark.value},
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return Started(process, Mark(mark.value, process.pid, _start_time(process.pid) or time.time()))


def alive(mark: Mark) -> bool:
    """Whether the first process runs still."""
    started = _start_time(mark.pid) if mark.pid else None
    return started is not None and abs(started - mark.started) < _SAME_START_SECONDS


def terminate(mark: Mark) -> None:
    """Ask the first process, and only it, to end: as the kubelet asks a container."""
    if alive(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(mark.pid, signal.SIGTERM)


async def sweep(mark: Mark) -> int:
    """Kill every process of a pod, its first one too. Returns how many there were."""
    return await asyncio.to_thread(_sweep, mark)


async def wait(mark: Mark, seconds: float) -> bool:
    """Wait for the end of a first process that another program started. False where it still runs after that time."""
    end = time.monotonic() + seconds
    while alive(mark):
        if time.monotonic() >= end:
            return False
        await asyncio.sleep(0.1)
    return True


def members(mark: Mark) -> list[psutil.Process]:
    """The processes of a pod that run now."""
    session = None if mark.pid == 0 or _reused(mark) else mark.pid
    own = [process for process in psutil.process_iter() if _belongs(process, mark.value, session)]
    found = {process.pid: process for process in own}
    for process in own:
        with contextlib.suppress(psutil.Error):
            found |= {child.pid: child for child in process.children(recursive=True)}
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _start_time(process.pid) is not None]


def _belongs(process: psutil.Process, value: str, session: int | None) -> bool:
    """By the mark; where a process has overwritten its environment, by the session."""
    try:
        environment = process.environ()
        if environment:
            return environment.get(MARK) == value
        return session is not None and os.getsid(process.pid) == session
    except (psutil.Error, OSError):
        return False


def _sweep(mark: Mark) -> int:
    killed: set[int] = set()
    # A process may start another between the look and the kill, so look again until nothing is found. The limit is for one that
    # cannot be killed because it waits for a device.
    for _ in range(_SWEEPS):
        left = members(mark)
        if not left:
            break
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        killed |= {process.pid for process in left}
        time.sleep(_SWEEP_SECONDS)
    return len(killed)


def _reused(mark: Mark) -> bool:
    """Whether the number of the first process now belongs to a stranger."""
    try:
        return abs(psutil.Process(mark.pid).create_time() - mark.started) >= _SAME_START_SECONDS
    except psutil.Error:
        return False


def _start_time(pid: int) -> float | None:
    """When a process started; None where there is none, or only what is left of it until its parent looks."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None
