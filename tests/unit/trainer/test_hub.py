"""Hub models against a hub of our own: real HTTP, the real client."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import tenacity

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import ModelSource, SecretReference
from finetune_trainer import sources
from finetune_trainer.errors import JobError
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.sources import Mounts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret_of_the_job"


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that a download needs, for one model."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.needs_token = False
        self.failures = 0
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, *, with_body: bool) -> None:  # noqa: PLR0911 - a table of routes
        path = self.path.partition("?")[0].strip("/")
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.failures > 0:
            self.server.failures -= 1
            return self.send(503, b"", with_body)
        if self.server.needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(403, b"", with_body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        parts = path.split("/")
        if path in ("api/models/owner/name", "api/models/owner/name/revision/main", f"api/models/owner/name/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.send(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode(), with_body)
        if path.startswith("api/models/owner/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data, usedforsecurity=False).hexdigest()}
                for name, data in self.server.files.items()
            ]
            return self.send(200, json.dumps(tree).encode(), with_body)
        if path.startswith("api/models/owner/name/revision/"):
            return self.send(404, b"", with_body, {"X-Error-Code": "RevisionNotFound"})
        if parts[:3] == ["owner", "name", "resolve"] and "/".join(parts[4:]) in self.server.files:
            name = "/".join(parts[4:])
            data = self.server.files[name]
            self.server.fetched += [name] if with_body else []
            etag = hashlib.sha1(data, usedforsecurity=False).hexdigest()
            return self.send(200, data, with_body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        return self.send(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hub(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    extra = {"pytorch_model.bin": b"pickle", "modeling_own.py": b"evil()", "README.md": b"", "original/model.safetensors": b"other"}
    server = Hub(files | extra)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(sources, "RETRY_WAIT", tenacity.wait_none())
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(
    tmp_path: Path, name: str = "owner/name", *, weights: bool = True, secret: bool = False, revision: str | None = None
) -> ModelFiles:
    reference = SecretReference(name="hub") if secret else None
    source = ModelSource(source=f"hf://{name}", secret_ref=reference, revision=revision)
    return fetch_model(source, Mounts(tmp_path), tmp_path / "cache", weights=weights)


def test_a_model_is_resolved_to_a_commit_and_only_what_is_safe_is_fetched(tmp_path: Path, hub: Hub, model_folder: Path) -> None:
    files = fetch(tmp_path)
    assert (files.revision, files.base.name, files.base.revision, files.weights) == (COMMIT, "owner/name", COMMIT, ("model.safetensors",))
    fetched = {path.name for path in files.folder.rglob("*") if path.is_file()}
    assert fetched == {path.name for path in model_folder.iterdir()} - {"README.md"}
    assert (files.folder / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    assert "pytorch_model.bin" not in hub.fetched


def test_the_head_leaves_the_weights_where_they_are(tmp_path: Path, hub: Hub) -> None:
    files = fetch(tmp_path, weights=False)
    assert files.weights == ("model.safetensors",)
    assert (files.folder / "config.json").exists()
    assert "model.safetensors" not in hub.fetched


def test_a_gated_model_needs_the_token_of_the_secret(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.needs_token = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(JobError, match="hf://owner/name: access is denied") as caught:
        fetch(tmp_path)
    assert caught.value.reason == Reason.AUTHENTICATION_FAILED
    assert hub.tokens == {None}
    (tmp_path / "secrets" / "hub").mkdir(parents=True)
    (tmp_path / "secrets" / "hub" / "token").write_text(TOKEN)
    assert fetch(tmp_path, secret=True).revision == COMMIT


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [("owner/other", None, "hf://owner/other does not exist"), ("owner/name", "v9", "hf://owner/name at v9 does not exist")],
)
def test_a_model_that_is_not_there(tmp_path: Path, hub: Hub, name: str, revision: str | None, message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        fetch(tmp_path, name, revision=revision)
    assert caught.value.reason == Reason.MODEL_NOT_FOUND


def test_a_model_without_safetensors(tmp_path: Path, hub: Hub) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(JobError, match=r"only pytorch_model\.bin") as caught:
        fetch(tmp_path, weights=False)
    assert caught.value.reason == Reason.UNSAFE_MODEL_FORMAT


def test_a_hub_that_is_busy_is_asked_again(tmp_path: Path, hub: Hub) -> None:
    hub.failures = 2
    assert fetch(tmp_path, weights=False).revision == COMMIT
