"""Which S3 servers a Secret may name under a profile: whoever answers for a bucket decides what is in it."""

from pathlib import Path

import pytest

from finetune_api.endpoint_bounds import EndpointBounds
from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import DataSource, ModelSource, Output, SecretReference
from finetune_trainer.errors import JobError
from finetune_trainer.model_files import fetch_model
from finetune_trainer.sources import Mounts, check_servers, resolve, resolve_data, resolve_storage

SERVERS = ("https://minio.example.com", "http://minio.example.com:9000", "https://gateway.example.com/storage/s3")
SECRET = SecretReference(name="s3")


def mounts_with(folder: Path, endpoint: str | None, *, allowed: tuple[str, ...] = SERVERS, secrets: tuple[str, ...] = ("s3",)) -> Mounts:
    """The volumes of a pod whose Secret s3 names a server, under a profile that bounds some Secrets."""
    keys = {"accessKeyId": "id", "secretAccessKey": "hidden"} | ({} if endpoint is None else {"endpoint": endpoint})
    (folder / "secrets" / "s3").mkdir(parents=True)
    for key, value in keys.items():
        (folder / "secrets" / "s3" / key).write_text(value, encoding="utf-8")
    return Mounts(folder, bounds=EndpointBounds(profile="small", secrets=secrets, allowed=allowed))


def asked_of(mounts: Mounts) -> tuple[str, str]:
    """Scheme and server that S3's client is given for the Secret."""
    client = resolve("s3://base/llama", mounts, "s3").filesystem.fs
    options = type(client).__reduce__(client)[1][0]
    return options["scheme"], options["endpoint_override"]


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [
        ("https://minio.example.com", ("https", "minio.example.com")),
        ("minio.example.com\n", ("https", "minio.example.com")),
        ("HTTPS://MinIO.Example.COM:443/", ("https", "MinIO.Example.COM:443")),
        ("https://minio.example.com//", ("https", "minio.example.com")),
        ("http://minio.example.com:9000", ("http", "minio.example.com:9000")),
        ("https://gateway.example.com/storage/s3/", ("https", "gateway.example.com/storage/s3")),
        ("https://minio.example.com?@evil.example.org", ("https", "minio.example.com")),
        ("https://minio.example.com#@evil.example.org", ("https", "minio.example.com")),
    ],
)
def test_a_server_of_the_list_is_asked(tmp_path: Path, endpoint: str, asked: tuple[str, str]) -> None:
    mounts = mounts_with(tmp_path, endpoint)
    check_servers(mounts)
    assert asked_of(mounts) == asked


HOSTILE = [
    "https://evil.example.org",
    "evil.example.org",
    "evil.example.org#://minio.example.com",
    "http://minio.example.com",  # another scheme, so another port
    "https://minio.example.com:9000",
    "minio.example.com:9000",
    "https://minio.example.com:",
    "https://minio.example.com:8443",
    "https://minio.example.com:443@evil.example.org",
    "https://minio.example.com@evil.example.org",
    "https://@evil.example.org",
    "https://:@minio.example.com",
    "https://user:hidden-too@minio.example.com",
    "https://minio.example.com.",
    "https://minio.example.com.evil.example.org",
    "https://evil-minio.example.com",
    "https://bucket.minio.example.com",
    "https://minio.example.com\\@evil.example.org",
    "https://minio.example.com\\.evil.example.org",
    "https://evil.example.org\\/minio.example.com",
    "https://minio.example.com%2eevil.example.org",
    "https://minio.example.com%00.evil.example.org",
    "https://minio\x00.example.com",
    "https://minio .example.com",
    "https://minio.example.\u0441om",  # a Cyrillic letter
    "https://minio\u3002example\u3002com",  # dots of Chinese, which some resolvers take for dots
    "https://[::1]:9000",
    "https://[minio.example.com",
    "https://[minio.example.com]",
    "https://2130706433",
    "https://minio.example.com/bucket-of-mine",  # the client would put it before the bucket
    "https://minio.example.com/.",
    "https://minio.example.com/bucket/..",
    "https://minio.example.com/%2e%2e/bucket",
    "https://minio.example.com//bucket",
    "https://minio.example.com/;bucket",
    "https://gateway.example.com",
    "https://gateway.example.com/storage",
    "https://gateway.example.com/storage/S3",
    "https://gateway.example.com/storage/s3/bucket",
    "https://gateway.example.com/storage/s3/../other",
    "ftp://minio.example.com",
    "https:///minio.example.com",
    "//minio.example.com",
]


@pytest.mark.parametrize("endpoint", HOSTILE)
def test_no_other_server_is(tmp_path: Path, endpoint: str) -> None:
    mounts = mounts_with(tmp_path, endpoint)
    for refuse in (lambda: check_servers(mounts), lambda: asked_of(mounts)):
        with pytest.raises(JobError) as refused:
            refuse()
        assert refused.value.reason in (Reason.PROFILE_VIOLATED, Reason.INVALID_SPEC)
        assert "Secret s3" in refused.value.message
        assert "example" not in refused.value.message
        assert "hidden" not in refused.value.message


def test_whatever_opens_with_the_secret_is_refused(tmp_path: Path) -> None:
    """Models, data and knowledge bases, storage."""
    mounts = mounts_with(tmp_path, "https://evil.example.org")
    for call in (
        lambda: fetch_model(ModelSource(source="s3://base/llama", secret_ref=SECRET), mounts, tmp_path / "cache", weights=False),
        lambda: resolve_data(DataSource(source="s3://rows/a.jsonl", secret_ref=SECRET), mounts),
        lambda: resolve_storage(Output(storage="s3://out/bot", secret_ref=SECRET), mounts),
    ):
        with pytest.raises(JobError) as refused:
            call()
        assert (refused.value.reason, refused.value.message) == (
            Reason.PROFILE_VIOLATED,
            "the key endpoint of the Secret s3 names an S3 server that the profile small does not allow (allow.s3Endpoints)",
        )


def test_a_server_that_a_renewed_secret_names_is_refused_too(tmp_path: Path) -> None:
    mounts = mounts_with(tmp_path, SERVERS[0])
    check_servers(mounts)
    (tmp_path / "secrets" / "s3" / "endpoint").write_text("https://evil.example.org")
    with pytest.raises(JobError, match=r"allow\.s3Endpoints"):
        asked_of(mounts)


@pytest.mark.parametrize("endpoint", [None, "", " \n"])
def test_aws_itself_needs_no_entry(tmp_path: Path, endpoint: str | None) -> None:
    mounts = mounts_with(tmp_path, endpoint, allowed=())
    check_servers(mounts)
    assert asked_of(mounts) == ("https", "")


def test_a_secret_that_no_list_bounds_names_any_server(tmp_path: Path) -> None:
    bounded = mounts_with(tmp_path, "http://lab.example.org/s3", secrets=("another",))
    for mounts in (bounded, Mounts(tmp_path)):
        check_servers(mounts)
        assert asked_of(mounts) == ("http", "lab.example.org/s3")


@pytest.mark.parametrize("region", ["x.example.org/", "@evil.example.org/#", "evil.example.org:443/?", "a b"])
def test_a_region_is_no_way_to_another_server(tmp_path: Path, region: str) -> None:
    """AWS's host has the region in it: the client refuses what is no label of a host before it asks anybody."""
    mounts = mounts_with(tmp_path, None)
    (tmp_path / "secrets" / "s3" / "region").write_text(region)
    place = resolve("s3://base/llama", mounts, "s3")
    with pytest.raises(OSError, match="region"):
        place.filesystem.info(place.path)
