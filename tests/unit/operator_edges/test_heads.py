"""Asking heads: one that does not answer is left alone for a while, and what is wrong is said once."""

import asyncio
import logging
from datetime import UTC, datetime

import pytest
from aiohttp import web

from finetune_api.report import Report
from finetune_operator import heads
from finetune_operator.heads import Heads
from finetune_operator.observed import Pod

POD = Pod("bot-1-head", "team", "p-1", "head", 1, "Running", datetime(2026, 1, 1, tzinfo=UTC), "127.0.0.1")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_silent_head_is_asked_ever_more_seldom(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(heads, "REPORT_SECONDS", 0.05)
    asked: list[float] = []
    clock = Clock()
    silent = await asyncio.start_server(lambda *_: asked.append(clock.now), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with silent, Heads(port, clock) as known:
        for second in range(200):
            clock.now = float(second)
            assert await known.report(POD, "t", 0, 0) is None
    assert asked == [0, 10, 30, 70, 150], "10, 20, 40 and 80 seconds apart"
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "no report from bot-1-head: no answer in time"
    ]


async def test_what_is_wrong_is_logged_once_until_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([401, 401, 500, 500, 200, 401])

    async def answer(_: web.Request) -> web.Response:
        status = next(answers)
        return web.json_response(Report(job_uid="u", attempt=1).to_json(), status=status)

    app = web.Application()
    app.add_routes([web.get("/report", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with Heads(port) as known:
        said = [await known.report(POD, "t", 0, 0) is not None for _ in range(6)]
    await runner.cleanup()
    assert said == [False, False, False, False, True, False]
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [words.rsplit(" ", 1)[1] for words in warned] == ["401", "500", "401"]
