"""Operators by the dozen: a process that has imported the operator already, and forks one for each order.

A forked operator is a process like any other (its own PID, environment, log and end); only the second of imports is saved.
As a program it reads orders, a JSON object a line, and tells of each fork's beginning and end.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


class Forks:
    """The test's side."""

    def __init__(self, program: asyncio.subprocess.Process) -> None:
        self._program = program
        self._begun: asyncio.Queue[int] = asyncio.Queue()
        self._ended: dict[int, asyncio.Future[int]] = {}
        self._order = asyncio.Lock()

    async def start(self, env: Mapping[str, str], log: Path) -> "Fork":
        """An operator with this environment, which writes its log to the file."""
        assert self._program.stdin
        async with self._order:
            self._program.stdin.write(json.dumps({"env": dict(env), "log": str(log)}).encode() + b"\n")
            pid = await self._begun.get()
        return Fork(pid, self._end_of(pid))

    async def listen(self) -> None:
        """Take note of beginnings and ends, until the program ends."""
        assert self._program.stdout
        async for line in self._program.stdout:
            told = json.loads(line)
            if "begun" in told:
                self._begun.put_nowait(told["begun"])
            else:
                self._end_of(told["ended"]).set_result(told["code"])

    def _end_of(self, pid: int) -> "asyncio.Future[int]":
        return self._ended.setdefault(pid, asyncio.get_running_loop().create_future())


class Fork:
    """One forked operator, with what the tests use of asyncio's Process."""

    def __init__(self, pid: int, ended: "asyncio.Future[int]") -> None:
        self.pid = pid
        self._ended = ended

    @property
    def returncode(self) -> int | None:
        return self._ended.result() if self._ended.done() else None

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)


@contextlib.asynccontextmanager
async def forks() -> AsyncIterator[Forks]:
    """The program, ready for orders."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "operator")}
    pipe = asyncio.subprocess.PIPE
    program = await asyncio.create_subprocess_exec(sys.executable, __file__, stdin=pipe, stdout=pipe, env=env, cwd=ROOT)
    made = Forks(program)
    listening = asyncio.create_task(made.listen())
    try:
        yield made
    finally:
        program.kill()
        await program.wait()
        listening.cancel()


def _tell(**what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _reap(*_: Any) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            _tell(ended=pid, code=os.waitstatus_to_exitcode(status))


def _serve() -> None:
    from finetune_operator import __main__ as program  # noqa: PLC0415 - only here, not in the test's process

    signal.signal(signal.SIGCHLD, _reap)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.environ.clear()
            os.environ.update(order["env"])
            try:
                program.main()
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else 1)
        _tell(begun=pid)


if __name__ == "__main__":
    _serve()
