"""hf:// against a hub of the tests' own: real HTTP, the real client."""

import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import tenacity
from fake_hub import COMMIT, TOKEN, FakeHub

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import DataSource, ModelSource, SecretReference
from finetune_trainer import sources
from finetune_trainer.data.rows import Row, read_rows
from finetune_trainer.errors import JobError
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.sources import Mounts, resolve_data


@pytest.fixture
def hub(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    extra = {"pytorch_model.bin": b"pickle", "modeling_own.py": b"evil()", "README.md": b"", "original/model.safetensors": b"other"}
    dataset = {"README.md": b"", "data/train-0.jsonl": b'{"text": "a"}\n{"text": "b"}', "data/train-1.jsonl": b'{"text": "c"}'}
    server = FakeHub(files | extra, dataset)
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


def test_a_model_is_resolved_to_a_commit_and_only_what_is_safe_is_fetched(tmp_path: Path, hub: FakeHub, model_folder: Path) -> None:
    files = fetch(tmp_path)
    assert (files.revision, files.base.name, files.base.revision, files.weights) == (COMMIT, "owner/name", COMMIT, ("model.safetensors",))
    fetched = {path.name for path in files.folder.rglob("*") if path.is_file()}
    assert fetched == {path.name for path in model_folder.iterdir()} - {"README.md"}
    assert (files.folder / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    assert "pytorch_model.bin" not in hub.fetched


def test_the_head_leaves_the_weights_where_they_are(tmp_path: Path, hub: FakeHub) -> None:
    files = fetch(tmp_path, weights=False)
    assert files.weights == ("model.safetensors",)
    assert (files.folder / "config.json").exists()
    assert "model.safetensors" not in hub.fetched


def test_a_gated_model_needs_the_token_of_the_secret(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_model_that_is_not_there(tmp_path: Path, hub: FakeHub, name: str, revision: str | None, message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        fetch(tmp_path, name, revision=revision)
    assert caught.value.reason == Reason.MODEL_NOT_FOUND


def test_a_model_without_safetensors(tmp_path: Path, hub: FakeHub) -> None:
    del hub.files["models"]["model.safetensors"]
    with pytest.raises(JobError, match=r"only pytorch_model\.bin") as caught:
        fetch(tmp_path, weights=False)
    assert caught.value.reason == Reason.UNSAFE_MODEL_FORMAT


def test_a_hub_that_is_busy_is_asked_again(tmp_path: Path, hub: FakeHub) -> None:
    hub.failures = 2
    assert fetch(tmp_path, weights=False).revision == COMMIT


def texts(tmp_path: Path, path: str, *, secret: bool = False) -> list[str]:
    reference = SecretReference(name="hub") if secret else None
    location = resolve_data(DataSource(source=f"hf://datasets/owner/{path}", secret_ref=reference), Mounts(tmp_path))
    return [row.columns["text"] for row in read_rows(location) if isinstance(row, Row)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [("name/data/train-1.jsonl", ["c"]), ("name/data", ["a", "b", "c"]), ("name", ["a", "b", "c"])],
)
def test_a_data_set(tmp_path: Path, hub: FakeHub, path: str, expected: list[str]) -> None:
    assert texts(tmp_path, path) == expected


@pytest.mark.parametrize("path", ["name/data/nothing.jsonl", "name/nothing", "other/data/train-0.jsonl"])
def test_a_data_set_that_is_not_there(tmp_path: Path, hub: FakeHub, path: str) -> None:
    with pytest.raises(JobError, match="does not exist") as caught:
        texts(tmp_path, path)
    assert caught.value.reason == Reason.DATASET_NOT_FOUND


def test_a_gated_data_set(tmp_path: Path, hub: FakeHub) -> None:
    hub.needs_token = True
    with pytest.raises(JobError) as caught:
        texts(tmp_path, "name/data")
    assert caught.value.reason == Reason.AUTHENTICATION_FAILED
    (tmp_path / "secrets" / "hub").mkdir(parents=True)
    (tmp_path / "secrets" / "hub" / "token").write_text(TOKEN)
    assert texts(tmp_path, "name/data", secret=True) == ["a", "b", "c"]
