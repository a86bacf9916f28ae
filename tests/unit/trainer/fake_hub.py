"""The part of the hub's HTTP interface that downloads need: one model and one data set, both of one name."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import datasets
import huggingface_hub
import pytest
import tenacity

from finetune_trainer import sources

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret_of_the_job"


class FakeHub(ThreadingHTTPServer):
    """What is asked of it is remembered."""

    daemon_threads = True

    def __init__(self, model: dict[str, bytes], dataset: dict[str, bytes], name: str = "owner/name") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.files = {"models": model, "datasets": dataset}
        self.needs_token = False
        self.token = TOKEN
        self.failures = 0
        """Requests that are yet to be answered with 503."""
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def lead_to(url: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Have the real clients ask this address, keep what they fetch in a folder, and not wait before they try again."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(datasets.config, "HF_ENDPOINT", url)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    patch.setattr(sources, "RETRY_WAIT", tenacity.wait_none())


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.failures > 0:
            self.server.failures -= 1
            return self.send(503)
        if self.server.needs_token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        path = unquote(self.path.partition("?")[0].strip("/"))
        for kind in ("models", "datasets"):
            api, files = f"api/{kind}/{self.server.name}", f"{'datasets/' if kind == 'datasets' else ''}{self.server.name}/resolve/"
            if path == api or path.startswith(f"{api}/"):
                return self.describe(kind, path.removeprefix(api).strip("/"), body)
            if path.startswith(files):
                return self.download(kind, path.removeprefix(files))
        return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def describe(self, kind: str, question: str, body: bytes) -> None:
        """Answers to: the repository, a revision, the files below a folder, single paths."""
        files = self.server.files[kind]
        what, _, rest = question.partition("/")
        revision, _, below = rest.partition("/")
        if what and revision not in ("main", COMMIT):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if what in ("", "revision"):
            return self.send_json({"id": self.server.name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        if what == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            return self.send_json([self.entries_of(kind)[path] for path in asked if path in self.entries_of(kind)])
        recursive = "recursive=true" in self.path.lower()
        prefix = f"{below}/" if below else ""
        paths = [name for name in self.entries_of(kind) if name.startswith(prefix) and (recursive or "/" not in name.removeprefix(prefix))]
        if not paths:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.send_json([self.entries_of(kind)[name] for name in paths])

    def entries_of(self, kind: str) -> dict[str, dict[str, object]]:
        """Every file and folder of the repository, by path."""
        entries: dict[str, dict[str, object]] = {}
        for name, data in self.server.files[kind].items():
            parts = name.split("/")[:-1]
            entries |= {
                "/".join(parts[: n + 1]): {"type": "directory", "path": "/".join(parts[: n + 1]), "oid": "0"} for n in range(len(parts))
            }
            entries[name] = {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
        return entries

    def download(self, kind: str, wanted: str) -> None:
        name = wanted.partition("/")[2]
        data = self.server.files[kind].get(name)
        if data is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.fetched.append(name)
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT}
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not first:
            return self.send(200, data, headers)
        end = min(int(last or len(data)), len(data) - 1)
        return self.send(206, data[int(first) : end + 1], headers | {"Content-Range": f"bytes {first}-{end}/{len(data)}"})

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


def _digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
