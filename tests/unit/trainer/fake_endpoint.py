"""A served model on this machine that answers as it is told to."""

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

Reply = Callable[[str, dict[str, Any]], tuple[int, dict[str, str], Any]]
"""From a path and a body to status, headers and content: JSON, a text or bytes as they are, Truncated or Late."""


@dataclass(frozen=True)
class Truncated:
    """JSON whose second half never comes: the connection is closed."""

    content: Any


@dataclass(frozen=True)
class Late:
    """JSON that comes after some seconds."""

    seconds: float
    content: Any


class FakeEndpoint:
    """An HTTP server in a thread of its own. A context."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        """Path, body and key of every request."""
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def questions(self) -> list[dict[str, Any]]:
        """The bodies of all requests but probes."""
        return [body for _, body, _ in self.asked if body["max_tokens"] != 1]

    def __enter__(self) -> "FakeEndpoint":
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        application = web.Application()
        application.router.add_post("/{path:.*}", self._answer)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        ready.set()
        await self._end.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        body = await request.json()
        path = request.path.removeprefix("/v1")
        self.asked.append((path, body, request.headers.get("Authorization")))
        await asyncio.sleep(0.01)
        self.at_once -= 1
        status, headers, content = self.reply(path, body)
        if isinstance(content, Late):
            await asyncio.sleep(content.seconds)
            content = content.content
        if isinstance(content, Truncated):
            return await _half(request, json.dumps(content.content).encode())
        if isinstance(content, bytes):
            return web.Response(status=status, headers=headers, body=content)
        if isinstance(content, str):
            return web.Response(status=status, headers=headers, text=content)
        return web.json_response(content, status=status, headers=headers)


async def _half(request: web.Request, whole: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(whole))})
    await response.prepare(request)
    await response.write(whole[: len(whole) // 2])
    assert request.transport is not None
    request.transport.close()
    return response


def completion(text: str, finish: str = "stop", logprobs: Any = None) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": logprobs}]}


def chat(text: str | None, finish: str = "stop", logprobs: Any = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}]}


def echo(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """The prompt, or the last message, in capitals."""
    if path == "/completions":
        return 200, {}, completion(body["prompt"].upper())
    return 200, {}, chat(body["messages"][-1]["content"].upper())
