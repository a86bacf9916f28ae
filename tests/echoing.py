"""A server that repeats the key it is sent, in every way in which servers refuse: hubs, object stores and models that tell too much."""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

Answer = tuple[int, dict[str, str], str]
"""Status, headers and body."""

ANSWERS: dict[str, Callable[[str], Answer]] = {
    "refused": lambda key: (401, {"WWW-Authenticate": f'Bearer error="{key}"'}, json.dumps({"error": {"message": f"{key} is no key"}})),
    "forbidden": lambda key: (403, {"X-Error-Message": f"{key} may not"}, f"{key} may not"),
    "bad request": lambda key: (400, {"X-Error-Message": f"not with {key}"}, json.dumps({"error": f"not with {key}"})),
    "absent": lambda key: (404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": f"nothing for {key}"}, f"nothing for {key}"),
    "broken": lambda key: (500, {"X-Error-Message": key}, f"KeyError: {key}\nheaders = {{'Authorization': 'Bearer {key}'}}"),
    "elsewhere": lambda key: (302, {"Location": f"http://127.0.0.1:9/login?who={key}"}, f"go to {key}"),
    "no JSON": lambda key: (200, {"Content-Type": "text/html"}, f"<html>Welcome, {key}</html>"),
}
"""By what the server does: from the key to what it says."""


class EchoingServer(ThreadingHTTPServer):
    """Answers every request alike. A context."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.heard: set[str] = set()
        """Every key that it was sent."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: EchoingServer
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        sent = self.headers.get("Authorization", "")
        s3 = re.search("Credential=([^/]+)/", sent)
        key = s3[1] if s3 else sent.removeprefix("Bearer ")
        self.server.heard.add(key)
        status, headers, body = self.server.answer(key)
        if s3:
            body = f"<Error><Code>Refused</Code><Message>{body}</Message></Error>"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any  # noqa: N815 - the library's names

    def log_message(self, *_: object) -> None:
        """Silent."""
