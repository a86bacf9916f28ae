from pathlib import Path

import fsspec
import httpx2
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import ConfigMapSource, DataSource
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location, Mounts, explained, files_under, is_transient, patiently, resolve, resolve_data


@pytest.fixture
def mounts(tmp_path: Path) -> Mounts:
    (tmp_path / "claims" / "data" / "sub").mkdir(parents=True)
    (tmp_path / "claims" / "data" / "sub" / "a.jsonl").write_text("{}")
    (tmp_path / "secrets" / "s3").mkdir(parents=True)
    return Mounts(tmp_path)


def reason_of(call: object) -> tuple[Reason, str]:
    with pytest.raises(JobError) as caught:
        call()
    return caught.value.reason, caught.value.message


def test_a_claim(mounts: Mounts) -> None:
    location = resolve("pvc://data/sub/a.jsonl", mounts)
    assert location.local_path() == mounts.root / "claims" / "data" / "sub" / "a.jsonl"
    assert location.uri == "pvc://data/sub/a.jsonl"
    assert location.filesystem.isfile(location.path)


def test_the_root_of_a_claim(mounts: Mounts) -> None:
    assert resolve("pvc://data", mounts).local_path() == mounts.root / "claims" / "data"
    assert resolve("pvc://data/", mounts).path == str(mounts.root / "claims" / "data")


def test_a_place_that_does_not_exist_yet(mounts: Mounts) -> None:
    location = resolve("pvc://data/new/folder", mounts)
    assert not location.filesystem.exists(location.path)
    assert location.child("file").uri == "pvc://data/new/folder/file"


def test_a_claim_that_is_not_mounted(mounts: Mounts) -> None:
    assert reason_of(lambda: resolve("pvc://other/a", mounts)) == (
        Reason.VOLUME_CLAIM_NOT_FOUND,
        "the PersistentVolumeClaim other is not mounted",
    )


@pytest.mark.parametrize("uri", ["pvc://data/../other", "pvc://data/a/../../b", "pvc://data/.."])
def test_no_way_up(mounts: Mounts, uri: str) -> None:
    assert reason_of(lambda: resolve(uri, mounts))[0] == Reason.INVALID_SPEC


@pytest.mark.parametrize("name", ["link", "sub/link/below"])
def test_no_link_out_of_a_claim(mounts: Mounts, name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (mounts.root / "claims" / "data" / "link").symlink_to(outside)
    (mounts.root / "claims" / "data" / "sub" / "link").symlink_to("/etc")
    assert reason_of(lambda: resolve(f"pvc://data/{name}", mounts)) == (
        Reason.INVALID_SPEC,
        f"pvc://data/{name}: a symbolic link leads out of the volume",
    )


def test_a_link_within_a_claim_is_followed(mounts: Mounts) -> None:
    claim = mounts.root / "claims" / "data"
    (claim / "latest").symlink_to(claim / "sub")
    assert resolve("pvc://data/latest/a.jsonl", mounts).local_path() == claim / "sub" / "a.jsonl"


def test_files_of_this_machine_are_for_local_runs(mounts: Mounts, tmp_path: Path) -> None:
    assert reason_of(lambda: resolve(f"file://{tmp_path}/a", mounts))[0] == Reason.INVALID_SPEC
    local = Mounts(mounts.root, local=True)
    assert resolve(f"file://{tmp_path}/a", local).local_path() == tmp_path / "a"
    assert resolve("file://./a", local).local_path() == Path.cwd() / "a"
    assert resolve("file://a/b", local).local_path() == Path.cwd() / "a" / "b"


@pytest.mark.parametrize("uri", ["http://169.254.169.254/latest", "github://a", "a/b", "gs://bucket/a"])
def test_other_schemes_are_refused(uri: str) -> None:
    assert reason_of(lambda: resolve(uri, Mounts(Path("/nowhere"), local=True)))[0] == Reason.INVALID_SPEC


def test_a_config_map_as_kubernetes_mounts_it(mounts: Mounts) -> None:
    """The key is a link to a link to a folder of the same volume."""
    folder = mounts.root / "configmaps" / "support"
    (folder / "..2026").mkdir(parents=True)
    (folder / "..2026" / "train.jsonl").write_text("{}")
    (folder / "..data").symlink_to("..2026")
    (folder / "train.jsonl").symlink_to("..data/train.jsonl")
    source = DataSource(config_map=ConfigMapSource(name="support", key="train.jsonl"))
    location = resolve_data(source, mounts)
    assert location.filesystem.cat_file(location.path) == b"{}"
    assert location.uri == "configMap support/train.jsonl"


def test_a_config_map_without_the_key(mounts: Mounts) -> None:
    source = DataSource(config_map=ConfigMapSource(name="support", key="train.jsonl"))
    assert reason_of(lambda: resolve_data(source, mounts)) == (
        Reason.CONFIG_MAP_NOT_FOUND,
        "the ConfigMap support has no key train.jsonl",
    )


def test_s3_takes_the_keys_of_the_secret(mounts: Mounts) -> None:
    for key, value in {"accessKeyId": "id\n", "secretAccessKey": "hidden", "endpoint": "http://minio.local:9000", "region": "eu"}.items():
        (mounts.root / "secrets" / "s3" / key).write_text(value)
    location = resolve("s3://bucket/a/b/", mounts, "s3")
    assert location.path == "bucket/a/b"
    inner = location.filesystem.fs
    assert inner.region == "eu"
    assert type(inner).__reduce__(inner)[1][0]["endpoint_override"] == "minio.local:9000"
    assert type(inner).__reduce__(inner)[1][0]["scheme"] == "http"
    assert type(inner).__reduce__(inner)[1][0]["access_key"] == "id"


def test_s3_without_a_key_in_its_secret(mounts: Mounts) -> None:
    (mounts.root / "secrets" / "s3" / "accessKeyId").write_text("id")
    assert reason_of(lambda: resolve("s3://bucket/a", mounts, "s3")) == (
        Reason.SECRET_NOT_FOUND,
        "the Secret s3 has no key secretAccessKey",
    )


@pytest.mark.parametrize("endpoint", ["ftp://host", "http://user:password@host", "http://"])
def test_an_endpoint_that_is_none(mounts: Mounts, endpoint: str) -> None:
    for key, value in {"accessKeyId": "id", "secretAccessKey": "hidden", "endpoint": endpoint}.items():
        (mounts.root / "secrets" / "s3" / key).write_text(value)
    reason, message = reason_of(lambda: resolve("s3://bucket/a", mounts, "s3"))
    assert reason == Reason.INVALID_SPEC
    assert "password" not in message


def test_the_hub_takes_the_token_of_the_secret_and_no_other(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_machine")
    (mounts.root / "secrets" / "hub").mkdir()
    (mounts.root / "secrets" / "hub" / "token").write_text("hf_of_the_job\n")
    location = resolve("hf://datasets/owner/name/train.jsonl", mounts, "hub")
    assert location.path == "datasets/owner/name/train.jsonl"
    assert location.filesystem.token == "hf_of_the_job"
    assert resolve("hf://datasets/owner/name", mounts).filesystem.token is False


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.jsonl", ".git/d.jsonl", "_tmp/e.jsonl", "a/.f.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = files_under(Location(fsspec.filesystem("file"), str(tmp_path), "pvc://data/"))
    assert [file.uri for file in found] == ["pvc://data/a/c.jsonl", "pvc://data/b.jsonl"]


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/api"))


@pytest.mark.parametrize(
    ("error", "transient", "reason"),
    [
        (HfHubHTTPError("busy", response=response(503)), True, Reason.STORAGE_UNAVAILABLE),
        (HfHubHTTPError("slow down", response=response(429)), True, Reason.STORAGE_UNAVAILABLE),
        (httpx2.ConnectError("reset"), True, Reason.STORAGE_UNAVAILABLE),
        (TimeoutError("timed out"), True, Reason.STORAGE_UNAVAILABLE),
        (OSError("When reading: AWS Error NETWORK_CONNECTION during HeadObject"), True, Reason.STORAGE_UNAVAILABLE),
        (OSError("AWS Error SLOW_DOWN"), True, Reason.STORAGE_UNAVAILABLE),
        (RepositoryNotFoundError("no", response=response(404)), False, Reason.DATASET_NOT_FOUND),
        (RepositoryNotFoundError("no", response=response(401)), False, Reason.DATASET_NOT_FOUND),
        (RevisionNotFoundError("no", response=response(404)), False, Reason.DATASET_NOT_FOUND),
        (GatedRepoError("gated", response=response(403)), False, Reason.AUTHENTICATION_FAILED),
        (HfHubHTTPError("who?", response=response(401)), False, Reason.AUTHENTICATION_FAILED),
        (OSError("AWS Error INVALID_ACCESS_KEY_ID during ListObjects"), False, Reason.AUTHENTICATION_FAILED),
        (OSError("AWS Error ACCESS_DENIED during HeadObject"), False, Reason.AUTHENTICATION_FAILED),
        (OSError("AWS Error NO_SUCH_BUCKET"), False, Reason.DATASET_NOT_FOUND),
        (FileNotFoundError("a"), False, Reason.DATASET_NOT_FOUND),
        (PermissionError("a"), False, Reason.AUTHENTICATION_FAILED),
        (OSError("Input/output error"), False, Reason.STORAGE_UNAVAILABLE),
        (TypeError("of our own"), False, Reason.INTERNAL_ERROR),
        (JobError(Reason.INVALID_SPEC, "a"), False, Reason.INVALID_SPEC),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, Exception) else "",
)
def test_what_an_error_means(error: Exception, transient: bool, reason: Reason) -> None:
    assert is_transient(error) is transient
    explanation = explained(error, "s3://bucket/a", Reason.DATASET_NOT_FOUND)
    assert explanation.reason == reason
    assert reason == Reason.INVALID_SPEC or "s3://bucket/a" in explanation.message


def failing(times: int, error: Exception) -> tuple[list[int], object]:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return calls, call


def test_failures_of_the_network_are_tried_again() -> None:
    waits: list[float] = []
    calls, call = failing(2, ConnectionError("reset"))
    assert patiently(call, waits.append) == "done"
    assert (len(calls), len(waits)) == (3, 2)


def test_but_not_for_ever() -> None:
    waits: list[float] = []
    calls, call = failing(99, ConnectionError("reset"))
    with pytest.raises(ConnectionError):
        patiently(call, waits.append)
    assert len(calls) == 5
    assert sum(waits) <= 2 + 4 + 8 + 16


def test_and_not_what_will_not_change() -> None:
    calls, call = failing(99, FileNotFoundError("a"))
    with pytest.raises(FileNotFoundError):
        patiently(call, pytest.fail)
    assert len(calls) == 1
