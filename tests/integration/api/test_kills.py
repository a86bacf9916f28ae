"""The operator is killed (SIGKILL) at every write of a job's life.

A fresh one brings the job to the same end, with no pod made twice and nothing left over.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import pytest
from tests.integration.api.apiserver import kubeconfig_through
from tests.integration.api.forks import Forks, forks
from tests.integration.api.players import Script, failure_then_success, success
from tests.integration.api.proxy import Proxy
from tests.integration.api.stages import NewStage, Stage

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


@pytest.mark.parametrize(("script", "head"), [(success, "tune-1-head"), (failure_then_success, "tune-2-head")], ids=["success", "retry"])
async def test_kill_at_every_write_changes_nothing(new_stage: NewStage, script: Script, head: str) -> None:
    begun, room = time.monotonic(), asyncio.Semaphore(AT_ONCE)
    async with forks() as ready:

        async def live(kill_at: int | None) -> Life:
            async with room:
                return await _live(await new_stage(), ready, script, head, kill_at)

        undisturbed = await live(None)
        assert undisturbed.end.status["phase"] == "Complete"
        points = range(1, len(undisturbed.writes) + 1)
        lives = await asyncio.gather(*(live(point) for point in points))

    cuts = [life.cut for life in lives if life.cut]
    print(f"\n{len(cuts)} kills in {time.monotonic() - begun:.0f} s, the last at {cuts[-1]}")
    for life in lives:
        assert life.end == undisturbed.end, (
            f"killed at write {life.writes.index(life.cut) + 1 if life.cut else 0}: {life.cut}\n{life.writes}"
        )
    # A busy machine may put two reports into one status, so a life may have a few writes fewer than the one that was counted.
    assert len(cuts) >= len(points) - 4


async def _live(stage: Stage, ready: Forks, script: Script, head: str, kill_at: int | None) -> Life:
    """One life, in which the operator is killed at a write and followed by another."""
    async with Proxy(stage.server.url).serving() as proxy, stage.player(script).playing() as player:
        kubeconfig = kubeconfig_through(stage.folder / "kubeconfig", proxy.url, stage.server.operator_kubeconfig)
        first, second = stage.operator(kubeconfig), stage.operator(kubeconfig)
        first.forks = second.forks = ready
        proxy.kill_at, proxy.kill = kill_at, first.kill
        await stage.apply()
        async with first.running():
            end = asyncio.create_task(stage.wait_for_end(first, second))
            gone = asyncio.create_task(_finished(stage, end, head))
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


async def _finished(stage: Stage, end: "asyncio.Task[dict[str, Any]]", head: str) -> dict[str, Any]:
    job = await end
    await stage.wait_for_children(f"Pod/{head}")
    return job


def _without_times(value: Any) -> Any:
    """A status without what a clock put into it, and what people read."""
    if isinstance(value, dict):
        return {key: _without_times(each) for key, each in value.items() if not key.endswith("Time") and key != "message"}
    return [_without_times(each) for each in value] if isinstance(value, list) else value
