"""An API server of a few lines that lists and watches, and misbehaves as it is told."""

import asyncio
import contextlib
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

GROUP = "/apis/finetune.dev/v1alpha1"
_NAMES = {"finetunejobs": ("FineTuneJob", True), "tuningprofiles": ("TuningProfile", False)}


@dataclass
class WatchedApi:
    """Keeps objects by plural and name, and a history that watches are told of."""

    port: int = 0
    token: str = "first"
    """What a request must show; anything else is a 401."""
    history: list[tuple[int, str, str, dict[str, Any]]] = field(default_factory=list)
    """Resource version, plural, type and object of each change."""
    oldest: int = 0
    """Resource versions before this one are forgotten: a watch from there is answered as Gone."""
    gone_as_status: bool = False
    """Gone is an HTTP status; else an event of the stream."""
    failing: list[web.Response] = field(default_factory=list)
    """Answers of the next watches of jobs."""
    told: Counter[str] = field(default_factory=Counter)
    """How often each was answered: list, watch, 401, Gone."""
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _silent: set[int] = field(default_factory=set)
    _streams: int = 0

    @property
    def version(self) -> int:
        return self.history[-1][0] if self.history else 1

    def objects(self, plural: str) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for _, kind, change, each in self.history:
            if kind == plural:
                found[each["metadata"]["name"]] = each
                if change == "DELETED":
                    del found[each["metadata"]["name"]]
        return list(found.values())

    async def change(self, change: str, name: str, plural: str = "finetunejobs", **meta: Any) -> None:
        """Something happens to an object."""
        version = self.version + 1
        body = {"namespace": "team", "name": name, "uid": f"u-{name}", "generation": version, "resourceVersion": str(version), **meta}
        self.history.append((version, plural, change, {"metadata": body}))
        await self.stir()

    async def stir(self) -> None:
        """Have every stream look what is new, whether it has been forgotten from where it was, or whether it is to be cut."""
        async with self._changed:
            self._changed.notify_all()

    def silence(self) -> None:
        """From now on the streams that are open are half open: nothing more comes, and no end."""
        self._silent = set(range(self._streams + 1))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        plural = request.path.rsplit("/", 1)[1]
        if request.headers.get("Authorization", "").lower() != f"bearer {self.token}":
            self.told["401"] += 1
            return _status(401, "Unauthorized", "who are you?")
        if request.path in _DISCOVERY:
            return web.json_response(_DISCOVERY[request.path])
        if plural not in (*_NAMES, "pods"):
            return _status(404, "NotFound", "not there")
        if request.query.get("watch") == "true":
            return await self._watch(request, plural)
        self.told[f"list {plural}"] += 1
        return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": self.objects(plural)})

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        self.told[f"watch {plural}"] += 1
        if plural == "finetunejobs" and self.failing:
            return self.failing.pop(0)
        since = int(request.query.get("resourceVersion", 0))
        if since < self.oldest and self.gone_as_status:
            self.told["Gone"] += 1
            return web.json_response(_GONE, status=410)
        return await self._stream(request, plural, since)

    async def _stream(self, request: web.Request, plural: str, since: int) -> web.StreamResponse:
        self._streams += 1
        number = self._streams
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            if since < self.oldest and number not in self._silent:
                if self.gone_as_status:
                    return response  # the end of this stream; the next one is answered with the status
                self.told["Gone"] += 1
                await response.write(json.dumps({"type": "ERROR", "object": _GONE}).encode() + b"\n")
                return response
            for version, kind, change, each in self.history:
                if version > since and kind == plural and number not in self._silent:
                    since = version
                    await response.write(json.dumps({"type": change, "object": each}).encode() + b"\n")
            async with self._changed:
                await self._changed.wait()


def _status(code: int, reason: str, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "reason": reason, "message": message}, status=code)


_GONE = {"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old resource version: 1 (99)"}
_VERBS = ["get", "list", "watch"]
_DISCOVERY: dict[str, Any] = {
    "/api": {"versions": ["v1"]},
    "/api/v1": {
        "resources": [
            {"name": "pods", "kind": "Pod", "singularName": "pod", "namespaced": True, "verbs": _VERBS},
            {"name": "namespaces", "kind": "Namespace", "singularName": "namespace", "namespaced": False, "verbs": _VERBS},
        ]
    },
    "/apis": {
        "groups": [{"name": "finetune.dev", "versions": [{"version": "v1alpha1"}], "preferredVersion": {"version": "v1alpha1"}}],
    },
    GROUP: {
        "resources": [
            {"name": name, "kind": kind, "singularName": kind.lower(), "namespaced": namespaced, "verbs": _VERBS}
            for name, (kind, namespaced) in _NAMES.items()
        ]
    },
}


@contextlib.asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[WatchedApi]:
    api = WatchedApi()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    api.port = runner.addresses[0][1]
    try:
        yield api
    finally:
        await runner.cleanup()


def kubeconfig(folder: Path, port: int, **user: str) -> Path:
    """A kubeconfig of a server on this machine, with a user who logs in so."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    file = folder / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    return file
