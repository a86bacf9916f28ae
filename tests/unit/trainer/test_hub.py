"""hf:// against a hub of the tests' own: real HTTP, the real client."""

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from fake_hub import COMMIT, TOKEN, FakeHub, lead_to
from pyarrow import parquet

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import DataSource, ModelSource, SecretReference
from finetune_trainer.data.inputs import input_of
from finetune_trainer.data.rows import Row
from finetune_trainer.errors import JobError
from finetune_trainer.model_files import ModelFiles, fetch_below, fetch_model
from finetune_trainer.sources import Mounts


@pytest.fixture
def hub(model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    extra = {"pytorch_model.bin": b"pickle", "modeling_own.py": b"evil()", "README.md": b"", "original/model.safetensors": b"other"}
    dataset = {"README.md": b"", "data/train-0.jsonl": b'{"text": "a"}\n{"text": "b"}', "data/train-1.jsonl": b'{"text": "c"}'}
    server = FakeHub(files | extra, dataset)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    lead_to(server.url, tmp_path_factory.mktemp("cache"), monkeypatch)
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


def test_a_file_of_a_folder_below_lies_beside_the_models(tmp_path: Path, hub: FakeHub) -> None:
    files, source = fetch(tmp_path), ModelSource(source="hf://owner/name")
    below = fetch_below(source, Mounts(tmp_path), tmp_path / "cache", files, "original/model.safetensors")
    assert below == files.folder / "original" / "model.safetensors"
    assert below.read_bytes() == b"other"
    with pytest.raises(JobError, match=r"hf://owner/name/1_Pooling/config\.json does not exist") as caught:
        fetch_below(source, Mounts(tmp_path), tmp_path / "cache", files, "1_Pooling/config.json")
    assert caught.value.reason == Reason.MODEL_INVALID


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


def rows(tmp_path: Path, path: str, *, secret: bool = False, purpose: str = "train", **more: str) -> list[object]:
    reference = SecretReference(name="hub") if secret else None
    source = DataSource(source=f"hf://datasets/owner/{path}", secret_ref=reference, **more)
    return list(input_of(source, purpose, Mounts(tmp_path)).rows())


def texts(tmp_path: Path, path: str, **more: object) -> list[str]:
    return [row.columns["text"] for row in rows(tmp_path, path, **more) if isinstance(row, Row)]


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


CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*.jsonl}
  - {split: extra, path: data/extra.jsonl}
- config_name: small
  data_files: small/*.jsonl
---
"""


@pytest.fixture
def described(hub: FakeHub) -> FakeHub:
    """A data set whose card names its splits and subsets."""
    small = b'{"text": "p"}\n{"text": "q"}'
    hub.files["datasets"] |= {"README.md": CARD, "data/extra.jsonl": b'{"text": "x"}', "small/0.jsonl": small}
    return hub


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"split": "extra"}, ["x"]),
        ({"split": "train"}, ["a", "b", "c"]),
        ({}, ["a", "b", "c"]),
        ({"subset": "small"}, ["p", "q"]),
        ({"subset": "small", "purpose": "test"}, ["p", "q"]),
    ],
    ids=["split", "other", "named as its purpose", "subset", "the only split"],
)
def test_a_split_by_its_name(tmp_path: Path, described: FakeHub, more: dict[str, str], expected: list[str]) -> None:
    assert texts(tmp_path, "name", **more) == expected


def test_a_data_set_of_parquet_with_more_than_text(tmp_path: Path, hub: FakeHub) -> None:
    """As most are; a picture stays as it is stored, since nobody looks at it."""
    picture = {"bytes": b"no picture", "path": None}
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    table, file = pa.table({"text": ["p"], "picture": [picture]}), io.BytesIO()
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features.to_dict()}})}), file)
    hub.files["datasets"] = {"data/train-00000-of-00001.parquet": file.getvalue()}
    (row,) = rows(tmp_path, "name")
    assert isinstance(row, Row)
    assert row.columns == {"text": "p", "picture": picture}


def test_rows_of_a_split_are_told_by_their_number(tmp_path: Path, described: FakeHub) -> None:
    places = [str(row.place) for row in rows(tmp_path, "name", split="train")]
    assert places == [f"hf://datasets/owner/name, train, row {number}" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"split": "dev"}, "hf://datasets/owner/name has no split dev, only train, extra; name one of them in split"),
        ({"purpose": "validation"}, "hf://datasets/owner/name has no split validation, only train, extra; name one of them in split"),
        (
            {"subset": "large"},
            "hf://datasets/owner/name cannot be read as a data set: BuilderConfig 'large' not found. Available: ['default', 'small']",
        ),
    ],
)
def test_a_split_or_subset_that_is_not_there(tmp_path: Path, described: FakeHub, more: dict[str, str], message: str) -> None:
    with pytest.raises(JobError) as caught:
        rows(tmp_path, "name", **more)
    assert (caught.value.reason, caught.value.message) == (Reason.DATASET_INVALID, message)


def test_a_data_set_with_broken_files(tmp_path: Path, described: FakeHub) -> None:
    described.files["datasets"]["data/extra.jsonl"] = b'{"text": '
    with pytest.raises(JobError, match="cannot be read as a data set after row 0 of extra: ") as caught:
        rows(tmp_path, "name", split="extra")
    assert caught.value.reason == Reason.DATASET_INVALID


def test_a_data_set_without_data(tmp_path: Path, hub: FakeHub) -> None:
    hub.files["datasets"] = {"README.md": b""}
    with pytest.raises(JobError, match="hf://datasets/owner/name cannot be read as a data set: ") as caught:
        rows(tmp_path, "name")
    assert caught.value.reason == Reason.DATASET_INVALID


def test_a_script_is_never_run(tmp_path: Path, hub: FakeHub) -> None:
    hub.files["datasets"] = {"name.py": b"raise SystemExit"}
    with pytest.raises(JobError, match="scripts are no longer supported") as caught:
        rows(tmp_path, "name")
    assert caught.value.reason == Reason.DATASET_INVALID


@pytest.mark.parametrize("subset", ["local", "url", "web", "above"])
def test_a_card_that_names_files_elsewhere(tmp_path: Path, hub: FakeHub, subset: str) -> None:
    """A data set's author must not reach what is mounted into the head, or have it ask an address of theirs."""
    (tmp_path / "key.jsonl").write_text('{"text": "a password"}')
    paths = {"local": f"{tmp_path}/key.jsonl", "url": f"file://{tmp_path}/key.jsonl", "web": f"{hub.url}/elsewhere/key.jsonl"}
    paths["above"] = f"../../../..{tmp_path}/key.jsonl"
    card = "".join(
        f"- config_name: {name}\n  data_files: '{path}'\n" for name, path in {"default": "a.jsonl", subset: paths[subset]}.items()
    )
    hub.files["datasets"] = {"README.md": f"---\nconfigs:\n{card}---\n".encode(), "a.jsonl": b'{"text": "a"}'}
    assert texts(tmp_path, "name", subset="default") == ["a"]
    with pytest.raises(JobError) as caught:
        texts(tmp_path, "name", subset=subset)
    assert caught.value.reason in (Reason.DATASET_INVALID, Reason.DATASET_NOT_FOUND)
    assert "password" not in caught.value.message
    assert not any("elsewhere" in path for path in hub.fetched)


def test_a_whole_data_set_that_is_not_there(tmp_path: Path, hub: FakeHub) -> None:
    with pytest.raises(JobError, match="hf://datasets/owner/other does not exist") as caught:
        rows(tmp_path, "other")
    assert caught.value.reason == Reason.DATASET_NOT_FOUND


def test_a_whole_data_set_that_is_gated(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.needs_token = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(JobError, match="hf://datasets/owner/name: access is denied") as caught:
        rows(tmp_path, "name")
    assert caught.value.reason == Reason.AUTHENTICATION_FAILED
    assert hub.tokens == {None}
    (tmp_path / "secrets" / "hub").mkdir(parents=True)
    (tmp_path / "secrets" / "hub" / "token").write_text(TOKEN)
    assert texts(tmp_path, "name", secret=True) == ["a", "b", "c"]


def test_a_busy_hub_is_asked_again_for_a_data_set(tmp_path: Path, hub: FakeHub) -> None:
    hub.failures = 2
    assert texts(tmp_path, "name") == ["a", "b", "c"]


def test_a_commit_and_a_blob_are_identities(tmp_path: Path, described: FakeHub) -> None:
    """Known without a row being read: of a data set the commit, of its files the digests that the hub keeps."""
    mounts = Mounts(tmp_path)
    identities = {
        path: input_of(DataSource(source=f"hf://datasets/owner/{path}", **more), "train", mounts).identity()
        for path, more in {"name": {"split": "extra"}, "name/data": {}, "name/data/extra.jsonl": {}}.items()
    }
    assert COMMIT in identities["name"]
    assert identities["name/data"][0] == identities["name/data/extra.jsonl"][0]
    assert len(set(identities["name/data"])) == 3
    assert not described.fetched
