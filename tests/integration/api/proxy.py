"""A reverse proxy between the operator and the API server: it counts the writes, and kills the operator at the one that it is told.

The kill comes after the API server has carried the write out and before its answer is passed on: the operator dies at the worst moment.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import aiohttp
from aiohttp import web

WRITES = ("POST", "PUT", "PATCH", "DELETE")
_PASSED_ON = ("Authorization", "Content-Type", "Accept")


class Proxy:
    """Forwards everything to one API server."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.url = ""
        self.writes: list[str] = []
        """Method, path and status of each write, in order."""
        self.reads = 0
        self.kill_at: int | None = None
        """Number of the write, from 1, at which `kill` is called; None never."""
        self.kill: Callable[[], None] = lambda: None

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Proxy"]:
        app = web.Application(client_max_size=16 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._forward)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        connector = aiohttp.TCPConnector(ssl=False, limit=0)
        async with aiohttp.ClientSession(
            connector=connector, auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None)
        ) as self._session:
            try:
                yield self
            finally:
                await runner.cleanup()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        body = await request.read()
        target = self._server + request.raw_path
        async with self._session.request(request.method, target, data=body or None, headers=headers) as upstream:
            if request.method in WRITES and "/leases" not in request.path:
                return await self._answer_write(request, upstream)
            self.reads += "watch=true" not in request.query_string
            response = web.StreamResponse(status=upstream.status, headers={"Content-Type": upstream.headers.get("Content-Type", "")})
            await response.prepare(request)
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # either side may end a watch
                async for chunk in upstream.content.iter_any():
                    await response.write(chunk)
            return response

    async def _answer_write(self, request: web.Request, upstream: aiohttp.ClientResponse) -> web.Response:
        answer = await upstream.read()
        self.writes.append(f"{request.method} {request.path} {upstream.status}")
        if self.kill_at == len(self.writes):
            self.kill()
            await asyncio.Event().wait()  # until the connection is gone, which cancels this
        return web.Response(status=upstream.status, body=answer, headers={"Content-Type": upstream.headers.get("Content-Type", "")})
