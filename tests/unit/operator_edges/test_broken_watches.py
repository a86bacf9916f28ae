"""Watches that end badly: what happened meanwhile is heard of all the same, in the same process, and nothing else of it is disturbed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.unit.operator_edges.watched_api import WatchedApi, kubeconfig, serving

from finetune_operator import __main__ as process
from finetune_operator.__main__ import Operator
from finetune_operator.cluster import connect
from finetune_operator.port import JobKey
from finetune_operator.settings import Settings
from finetune_operator.watching import watch_settings


@pytest.fixture
async def api() -> AsyncIterator[WatchedApi]:
    async with serving() as made:
        yield made


class Watching:
    """The operator's watch, alone: nobody works on what it hears."""

    def __init__(self) -> None:
        self.woken: list[str] = []

    def wake(self, key: JobKey, happened: bool) -> None:
        self.woken.append(key.name)

    async def hears(self, *names: str) -> None:
        await until(lambda: set(names) <= set(self.woken), lambda: f"heard of {self.woken}, not of {names}")


async def until(condition: Callable[[], bool], words: Callable[[], str]) -> None:
    try:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(words()) from None


@contextlib.asynccontextmanager
async def watching(api: WatchedApi, folder: Path, monkeypatch: pytest.MonkeyPatch, **user: str) -> AsyncIterator[Watching]:
    """The operator watches, until something in it breaks for good."""
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(folder, api.port, **(user or {"token": "first"}))))
    monkeypatch.setattr(process, "WATCH_RETRY_SECONDS", 0.1)
    watched, operator = Watching(), Operator(Settings(leader_election=False))
    monkeypatch.setattr(operator, "_wake", watched.wake)
    async with connect() as operator._cluster:
        task = asyncio.create_task(operator._watch(asyncio.Event()))
        await until(lambda: api.told["watch finetunejobs"] + api.told["watch pods"] >= 2, lambda: f"it does not watch: {api.told}, {task}")
        try:
            yield watched
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.mark.parametrize("gone_as_status", [False, True], ids=["event", "status"])
async def test_what_happened_before_a_watch_is_told_that_it_is_gone_is_listed(
    api: WatchedApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone_as_status: bool
) -> None:
    api.gone_as_status = gone_as_status
    for name in "stays", "changes", "goes":
        await api.change("ADDED", name)
    async with watching(api, tmp_path, monkeypatch) as watched:
        await watched.hears("stays", "changes", "goes")
        watched.woken.clear()
        bystander = asyncio.create_task(asyncio.Event().wait())  # made after the watch, as the parts of a reconcile are
        api.silence()  # what happens now no stream tells
        await api.change("MODIFIED", "changes")
        await api.change("ADDED", "new")
        await api.change("DELETED", "goes")
        api._silent.clear()
        api.oldest = api.version
        await api.stir()
        await watched.hears("changes", "new")
        assert api.told["Gone"] >= 1
        assert "goes" not in watched.woken, "nothing is to be done for a job that is gone"
        await api.change("ADDED", "later")
        await watched.hears("later")
        assert not bystander.done(), "kopf stopped a task that is not its own"
        bystander.cancel()


ANSWERS: dict[str, Callable[[], web.Response]] = {
    "an error in the stream": lambda: web.Response(
        text='{"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "unable to decode an event from the watch stream"}}\n'
    ),
    "no JSON": lambda: web.Response(text="<html>maintenance</html>\n"),
    "a time to wait in words": lambda: web.Response(status=429, headers={"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_a_watch_that_is_answered_with_nonsense_is_begun_anew(
    api: WatchedApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[], web.Response]
) -> None:
    await api.change("ADDED", "first")
    api.failing = [answer()]
    async with watching(api, tmp_path, monkeypatch) as watched:
        await until(lambda: not api.failing and api.told["watch finetunejobs"] >= 2, lambda: f"not watched again: {api.told}")
        await api.change("ADDED", "second")
        await watched.hears("first", "second")


async def test_a_half_open_watch_is_noticed_and_goes_on_from_where_it_was(
    api: WatchedApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hasty() -> Any:
        settings = watch_settings()
        settings.watching.inactivity_timeout = 0.3
        return settings

    monkeypatch.setattr("finetune_operator.handlers.watch_settings", hasty)
    async with watching(api, tmp_path, monkeypatch) as watched:
        await api.change("ADDED", "before")
        await watched.hears("before")
        lists = api.told["list finetunejobs"]
        api.silence()
        await api.change("ADDED", "meanwhile")
        await watched.hears("meanwhile")
        assert api.told["list finetunejobs"] == lists, "what a watch has missed is told from where it was"


def test_a_silent_watch_is_noticed_within_seventy_seconds() -> None:
    watch = watch_settings().watching
    assert 60 < watch.inactivity_timeout <= 70, "API servers send a bookmark every 60 seconds, and keep events for 75"
    assert watch.server_timeout is not None
    assert watch.client_timeout is not None
    assert watch.server_timeout < watch.client_timeout <= 330, "the same for servers that send no bookmarks and keep the connection busy"
