"""A reverse proxy between the operator and the API server: it counts the writes, and kills the operator at the one that it is told.

The kill comes after the API server has carried the write out and before its answer is passed on: the operator dies at the worst moment.
"""

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
from aiohttp import web

Fault = int
"""HTTP status that a request is answered with, or REFUSED: the connection is cut."""
REFUSED = 1
WRITES = ("POST", "PUT", "PATCH", "DELETE")
_PASSED_ON = ("Authorization", "Content-Type", "Accept")


class Proxy:
    """Forwards everything to one API server."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.url = ""
        self.used: set[tuple[str, str]] = set()
        """Verb and resource, as RBAC names them, of each request."""
        self._faults: Iterator[Fault] = iter(())
        self._watches: set[asyncio.Task[None]] = set()
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

    def fail(self, *faults: Fault) -> None:
        """Cut every watch, and answer so many requests from now on with these."""
        self._faults = iter(faults)
        for watch in self._watches:
            watch.cancel()

    @property
    def failing(self) -> bool:
        """Whether faults are left."""
        self._faults, rest = itertools.tee(self._faults)
        return next(rest, None) is not None

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        if fault := next(self._faults, None):
            if fault == REFUSED and request.transport:
                request.transport.abort()
            return web.json_response({"reason": "Injected"}, status=fault, headers={"Retry-After": "1"} if fault == 429 else None)
        watch = "watch=true" in request.query_string
        if use := _use(request.method, request.path, watch):
            self.used.add(use)
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        body = await request.read()
        async with self._session.request(request.method, self._server + request.raw_path, data=body or None, headers=headers) as upstream:
            if request.method in WRITES and "/leases" not in request.path:
                return await self._answer_write(request, upstream)
            self.reads += not watch
            response = web.StreamResponse(status=upstream.status, headers={"Content-Type": upstream.headers.get("Content-Type", "")})
            await response.prepare(request)
            stream = asyncio.create_task(_stream(upstream, response))
            self._watches.add(stream)
            try:
                await asyncio.wait([stream])
            finally:
                stream.cancel()
                self._watches.discard(stream)
            return response

    async def _answer_write(self, request: web.Request, upstream: aiohttp.ClientResponse) -> web.Response:
        answer = await upstream.read()
        self.writes.append(f"{request.method} {request.path} {upstream.status}")
        if self.kill_at == len(self.writes):
            self.kill()
            await asyncio.Event().wait()  # until the connection is gone, which cancels this
        return web.Response(status=upstream.status, body=answer, headers={"Content-Type": upstream.headers.get("Content-Type", "")})


async def _stream(upstream: aiohttp.ClientResponse, response: web.StreamResponse) -> None:
    with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # either side may end a watch
        async for chunk in upstream.content.iter_any():
            await response.write(chunk)


_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_PATH = re.compile(r"^/apis?/(?:[^/]+/)?v[^/]+/(?:namespaces/[^/]+/)?(?P<resource>[a-z]+)(?:/(?P<name>[^/]+)(?:/(?P<part>[a-z]+))?)?$")


def _use(method: str, path: str, watch: bool) -> tuple[str, str] | None:
    """Verb and resource of a request, as RBAC has them; None for discovery."""
    found = _PATH.match(path)
    if not found:
        return None
    resource = found["resource"] + (f"/{found['part']}" if found["part"] else "")
    if method == "DELETE" and not found["name"]:
        return "deletecollection", resource
    return _VERBS.get(method) or ("watch" if watch else "get" if found["name"] else "list"), resource
