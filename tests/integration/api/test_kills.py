"""The operator is killed (SIGKILL) at every write of a job's life.

A fresh one brings the job to the same end, with no pod made twice and nothing left over.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.integration.api.apiserver import kubeconfig_through
from tests.integration.api.forks import Forks, forks
from tests.integration.api.operators import Operator
from tests.integration.api.players import Player, Script, endless, failed, failure_then_success, success
from tests.integration.api.proxy import Proxy
from tests.integration.api.stages import NewStage, Stage, is_true

from finetune_api.report import Report

pytestmark = [pytest.mark.api, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

AT_ONCE = 5
"""Lives that are lived side by side, each in a namespace and with an operator of its own."""


@dataclass(frozen=True)
class End:
    """What is left of a life, without its times."""

    status: dict[str, Any]
    children: list[str]
    pods: list[str]
    """Names of the pods that ever were; one that was made twice stands twice."""


@dataclass(frozen=True)
class Life:
    """A life, and at which write it was cut."""

    end: End
    writes: list[str]
    cut: str | None


Act = Callable[[Stage, Player], Awaitable[None]]
"""What somebody does to a job while it lives."""


async def _nothing(stage: Stage, player: Player) -> None:
    """The job is left to itself."""


async def _suspend_and_resume(stage: Stage, player: Player) -> None:
    await _trains(stage)
    await _change(stage, spec={"suspend": True})
    await stage.wait_for_job(lambda job: job["status"]["phase"] == "Suspended", "suspended")
    await _change(stage, spec={"suspend": False})


async def _lose_the_head(stage: Stage, player: Player) -> None:
    await _trains(stage)
    await player.lose("tune-1-head")


async def _retry(stage: Stage, player: Player) -> None:
    await stage.wait_for_job(lambda job: is_true(job, "Failed"), "failed")
    await _change(stage, metadata={"annotations": {"finetune.dev/retry": "1"}})


async def _cancel(stage: Stage, player: Player) -> None:
    await _trains(stage)
    await _change(stage, metadata={"annotations": {"finetune.dev/cancel": "true"}})


async def _trains(stage: Stage) -> None:
    await stage.wait_for_job(lambda job: job.get("status", {}).get("workersReady") == 2, "training")


async def _change(stage: Stage, **patch: Any) -> None:
    await stage.kube.patch("FineTuneJob", stage.namespace, "tune", patch)


def endless_then_success(uid: str, attempt: int) -> list[Report]:
    return endless(uid, attempt) if attempt == 1 else success(uid, attempt)


def hopeless_then_success(uid: str, attempt: int) -> list[Report]:
    return [*endless(uid, 1), failed(uid, 1, "TrainingDiverged", retryable=False)] if attempt == 1 else success(uid, attempt)


@dataclass(frozen=True)
class Course:
    """A life, and how it ends."""

    script: Script
    act: Act = _nothing
    spec: dict[str, Any] = field(default_factory=dict)
    phase: str = "Complete"
    children: tuple[str, ...] = ("Pod/tune-2-head",)


COURSES = {
    "success": Course(success, children=("Pod/tune-1-head",)),
    "retry": Course(failure_then_success),
    "suspended and resumed": Course(endless_then_success, _suspend_and_resume),
    "preempted": Course(endless_then_success, _lose_the_head),
    "failed and retried by annotation": Course(hopeless_then_success, _retry),
    "canceled": Course(endless, _cancel, phase="Failed", children=()),
    "deadline": Course(endless, spec={"activeDeadlineSeconds": 15}, phase="Failed", children=()),
}


QUICK = ("success", "retry")


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if name in QUICK else (pytest.mark.long,)


@pytest.mark.parametrize("course", [pytest.param(course, id=name, marks=_marks(name)) for name, course in COURSES.items()])
async def test_kill_at_every_write_changes_nothing(new_stage: NewStage, course: Course) -> None:
    begun, room = time.monotonic(), asyncio.Semaphore(AT_ONCE)
    async with forks() as ready:

        async def live(kill_at: int | None) -> Life:
            async with room:
                return await _live(await new_stage(), ready, course, kill_at)

        undisturbed = await live(None)
        points = range(1, len(undisturbed.writes) + 1)
        lives = await asyncio.gather(*(live(point) for point in points))

    cuts = [life.cut for life in lives if life.cut]
    print(f"\n{len(cuts)} kills in {time.monotonic() - begun:.0f} s, the last at {cuts[-1]}")
    for life in lives:
        assert life.end == undisturbed.end, (
            f"killed at write {life.writes.index(life.cut) + 1 if life.cut else 0}: {life.cut}\n{life.writes}"
        )
    # What may ride along with the next status has one of its own or not, by how fast the machine is: in each attempt that its head runs,
    # Preparing, that all workers run, and Evaluating. So a life may have a few writes fewer than the one that was counted.
    assert len(cuts) >= len(points) - 4 * undisturbed.end.status["attempt"]["number"]


async def _live(stage: Stage, ready: Forks, course: Course, kill_at: int | None) -> Life:
    """One life, in which the operator is killed at a write and followed by another."""
    async with Proxy(stage.server.url).serving() as proxy, stage.player(course.script).playing() as player:
        kubeconfig = kubeconfig_through(stage.folder / "kubeconfig", proxy.url, stage.server.operator_kubeconfig)
        first, second = stage.operator(kubeconfig), stage.operator(kubeconfig)
        first.forks = second.forks = ready
        proxy.kill_at, proxy.kill = kill_at, first.kill
        await stage.apply(**course.spec)
        async with first.running():
            gone = asyncio.create_task(_finished(stage, player, course, first, second))
            died = asyncio.create_task(first.exited())
            await asyncio.wait([gone, died], return_when=asyncio.FIRST_COMPLETED)
            cut = None
            if died.done():
                cut = proxy.writes[-1] if kill_at == len(proxy.writes) else "not at a write"
                async with second.running():
                    await gone
            else:
                died.cancel()
            job = await gone
        names = [name for name, _ in player.created]
        return Life(End(_without_times(job["status"]), await stage.children(), sorted(names)), proxy.writes, cut)


async def _finished(stage: Stage, player: Player, course: Course, *operators: Operator) -> dict[str, Any]:
    await course.act(stage, player)
    job = await stage.wait_for_job(lambda job: job.get("status", {}).get("phase") == course.phase, course.phase, *operators)
    await stage.wait_for_children(*course.children)
    return job


def _without_times(value: Any) -> Any:
    """A status without what a clock put into it, and what people read."""
    if isinstance(value, dict):
        return {
            key: _without_times(each) for key, each in value.items() if not key.endswith(("Time", "Seconds", "Seen")) and key != "message"
        }
    return [_without_times(each) for each in value] if isinstance(value, list) else value
