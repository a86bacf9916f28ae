"""Sessions of processes: known again, and ended with everything that they started."""

import asyncio
import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from finetune_operator.local import processes
from finetune_operator.local.processes import Mark, mark_from

TREE = """
import ctypes, os, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
far = subprocess.Popen(["sleep", "600"], start_new_session=True)
bare = subprocess.Popen(["sleep", "600"], env={})
open(sys.argv[1] + ".part", "w").write(f"{child.pid} {far.pid} {bare.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""


async def eventually(condition, seconds=20.0):
    """Wait until a condition holds; its last value."""
    for _ in range(int(seconds / 0.05)):
        if value := condition():
            return value
        await asyncio.sleep(0.05)
    return condition()


@pytest.fixture
async def tree(tmp_path):
    """A process with a child in its session, one in another session, and one whose environment was emptied."""
    told = tmp_path / "pids"
    started = await processes.start(
        [sys.executable, "-c", TREE, str(told)], dict(os.environ), tmp_path, tmp_path / "log", processes.new_mark()
    )
    assert await eventually(told.exists)
    yield started, [int(pid) for pid in told.read_text().split()]
    await processes.sweep(started.mark)
    await started.process.wait()


def gone(pids):
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


async def test_sweeping_ends_every_process_of_a_pod(tree):
    started, pids = tree
    assert {process.pid for process in processes.members(started.mark)} == {started.process.pid, *pids}
    assert await processes.sweep(started.mark) == 4
    assert await started.process.wait() == -9
    assert gone(pids)


async def test_children_are_found_when_the_first_process_is_dead(tree):
    started, pids = tree
    os.kill(started.process.pid, 9)
    await started.process.wait()
    assert not processes.alive(started.mark)
    assert {process.pid for process in processes.members(started.mark)} == set(pids)
    await processes.sweep(started.mark)
    assert gone(pids)


async def test_a_later_run_knows_the_processes_by_what_was_written(tree):
    started, pids = tree
    mark = mark_from(json.loads(json.dumps(started.mark.to_json())))
    assert mark == started.mark
    assert processes.alive(mark)
    await processes.sweep(mark)
    await started.process.wait()
    assert gone(pids)


async def test_processes_are_found_by_the_mark_that_was_written_before_the_start(tree):
    started, pids = tree
    early = Mark(started.mark.value)
    assert not processes.alive(early)
    # One of the children has an empty environment, and its parent is known by the mark.
    assert {process.pid for process in processes.members(early)} == {started.process.pid, *pids}
    assert processes.members(processes.new_mark()) == []


async def test_a_stranger_with_the_same_number_is_left_alone(tmp_path):
    stranger = await processes.start(["sleep", "600"], dict(os.environ), tmp_path, tmp_path / "log", processes.new_mark())
    try:
        old = Mark("another mark", stranger.process.pid, stranger.mark.started - 60)
        assert not processes.alive(old)
        processes.terminate(old)
        assert await processes.sweep(old) == 0
        assert await processes.wait(old, 0)
        assert processes.alive(stranger.mark)
    finally:
        await processes.sweep(stranger.mark)
        await stranger.process.wait()


async def test_terminating_asks_the_first_process_alone(tree):
    started, pids = tree
    processes.terminate(started.mark)
    assert await started.process.wait() == -15
    assert not gone(pids)


async def test_waiting_has_an_end(tree):
    started, _ = tree
    assert not await processes.wait(started.mark, 0.2)


async def test_output_goes_to_the_end_of_the_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    started = await processes.start(["sh", "-c", "echo out; echo err >&2"], dict(os.environ), tmp_path, log, processes.new_mark())
    assert await started.process.wait() == 0
    assert log.read_text() == "before\nout\nerr\n"


async def test_a_program_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        await processes.start([str(tmp_path / "absent")], {}, tmp_path, Path(os.devnull), processes.new_mark())


@pytest.mark.parametrize("raw", [{}, {"value": "v"}, {"value": "v", "pid": "x", "started": 1}, {"value": "v", "pid": 1, "started": None}])
def test_what_is_not_a_mark_is_none(raw):
    assert mark_from(raw) is None
