"""Heads of many trainings that go on for ever: each has its address, and says a further step whenever it is asked."""

import contextlib
import time
from collections.abc import AsyncIterator

from aiohttp import web
from tests.integration.api.operators import KEY
from tests.integration.api.players import endless

from finetune_api.status import Progress
from finetune_operator.settings import Settings

TOTAL_STEPS = 1_000_000


class Heads:
    """Serves the reports of jobs in their first attempt. Who asks is known by the attempt's token."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._settings = Settings(token_key=KEY.encode())
        self._jobs: dict[str, str] = {}
        """UID by what the operator shows."""
        self._begun = time.monotonic()
        self.asked = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Heads"]:
        app = web.Application()
        app.add_routes([web.get("/report", self._answer)])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        try:
            yield self
        finally:
            await self._runner.cleanup()

    async def add(self, uid: str, address: str) -> None:
        """One more head."""
        self._jobs[f"Bearer {self._settings.token(uid, 1)}"] = uid
        await web.TCPSite(self._runner, address, self._port).start()

    async def _answer(self, request: web.Request) -> web.Response:
        uid = self._jobs.get(request.headers.get("Authorization", ""))
        if uid is None:
            return web.Response(status=401)
        self.asked += 1
        step = 10 + int(10 * (time.monotonic() - self._begun))  # ten steps a second: no two questions find the same
        progress = Progress(percent=100 * step // TOTAL_STEPS, step=step, total_steps=TOTAL_STEPS, epoch=step / TOTAL_STEPS)
        report = endless(uid, 1)[-1]
        return web.json_response(report.model_copy(update={"revision": step, "progress": progress}).to_json())
