"""Which URIs a list of beginnings allows: whole segments, one spelling, and nothing that can be read in two ways."""

import re
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune_api.allow_list import allows, canonical, is_one_of
from finetune_api.fields import DATA_URI, ENDPOINT_URL, MODEL_URI, STORAGE_URI

ALLOWED = [
    ("hf://Qwen/", "hf://Qwen/Qwen3-8B"),
    ("hf://Qwen", "hf://Qwen/Qwen3-8B"),
    ("hf://Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B"),
    ("hf://Qwen/Qwen3-8B/", "hf://Qwen/Qwen3-8B"),
    ("pvc://", "pvc://any/path"),
    ("pvc://models", "pvc://models"),
    ("pvc://models", "pvc://models/"),
    ("pvc://models/base", "pvc://models/base/llama"),
    ("s3://bucket/a/b", "s3://bucket/a/b/c"),
    ("hf://datasets/org", "hf://datasets/org/set/train.jsonl"),
    ("https://models.example.com/v1", "https://models.example.com/v1"),
    ("https://models.example.com", "https://models.example.com/v1/"),
    ("https://models.example.com/v1", "https://Models.Example.COM:443/v1"),
    ("http://models:80/v1", "http://models/v1"),
]
REFUSED = [
    ("hf://Qwen/", "hf://Qwen-evil/model"),
    ("hf://Qwen", "hf://Qwen-evil/model"),
    ("hf://Qwen/", "hf://Qwen.evil/model"),
    ("hf://Qwen/", "hf://evil/Qwen"),
    ("hf://Qwen/", "hf://Qwen/../evil/model"),
    ("hf://Qwen/", "hf://Qwen/./model"),
    ("hf://Qwen/", "hf://Qwen//model"),
    ("hf://Qwen/", "hf:///Qwen/model"),
    ("hf://Qwen/", "HF://Qwen/model"),
    ("hf://Qwen/", "hf://qwen/model"),
    ("hf://Qwen/", "hf://Qwen%2Fevil/model"),
    ("hf://Qwen/", "hf://%51wen/model"),
    ("hf://Qwen/", "hf://Qwen\\evil/model"),
    ("hf://Qwen/", "hf://Qwen/model\n"),
    ("hf://Qwen/", "hf://Qwen/model\x00"),
    ("hf://Qwen/", " hf://Qwen/model"),
    ("hf://Qwen/", "hf://\uff31wen/model"),
    ("hf://Qwen/", "hf://Qwen/model?x=1"),
    ("hf://Qwen/", "hf://Qwen/model#x"),
    ("hf://Qwen/", "hf://me@Qwen/model"),
    ("hf://Qwen/", "s3://Qwen/model"),
    ("hf://Qwen/", "file:///Qwen/model"),
    ("hf://Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B-evil"),
    ("hf://Qwen/Qwen3-8B", "hf://Qwen"),
    ("hf://org", "hf://datasets/org/set"),
    ("pvc://models/base", "pvc://models/baseline/llama"),
    ("pvc://models/base", "pvc://models"),
    ("pvc://models", "pvc://models-of-others/x"),
    ("s3://bucket/a", "s3://bucket::s3://other/a"),
    ("https://models.example.com/v1", "https://models.example.com.evil.org/v1"),
    ("https://models.example.com/v1", "https://models.example.com@evil.org/v1"),
    ("https://models.example.com/v1", "http://models.example.com/v1"),
    ("https://models.example.com/v1", "https://models.example.com:8443/v1"),
    ("https://models.example.com/v1", "https://models.example.com/v10"),
    ("https://models.example.com/v1", "https://models.example.com/v1/../v2"),
    ("https://models.example.com/v1", "https://models.example.com/"),
]


@pytest.mark.parametrize(("beginning", "uri"), ALLOWED)
def test_what_begins_so_is_allowed(beginning, uri):
    assert allows([beginning], uri)


@pytest.mark.parametrize(("beginning", "uri"), REFUSED)
def test_what_only_looks_like_it_is_not(beginning, uri):
    assert not allows([beginning], uri)


SERVERS = ["https://minio.example.com", "http://gateway.example.com:9000/storage/s3/"]


@pytest.mark.parametrize(
    "url",
    ["https://minio.example.com", "https://MinIO.example.com:443/", "http://gateway.example.com:09000/storage/s3"],
)
def test_a_url_is_one_of_a_list_in_any_spelling_of_its_host(url):
    assert is_one_of(SERVERS, url)


@pytest.mark.parametrize(
    "url",
    [
        "https://minio.example.com/bucket",
        "http://gateway.example.com:9000/storage",
        "http://gateway.example.com:9000/storage/S3",
        "http://gateway.example.com:9000/storage/s3/x",
        "http://gateway.example.com/storage/s3",
        "http://minio.example.com",
        "https://minio.example.com.",
        "https://",
        "",
    ],
)
def test_what_is_beside_or_below_a_url_is_another(url):
    assert not is_one_of(SERVERS, url)
    assert not is_one_of([], url)


def test_no_list_allows_everything_and_an_empty_one_nothing():
    assert allows(None, "hf://a/b")
    assert not allows([], "hf://a/b")
    assert allows(["hf://x/", "hf://a/"], "hf://a/b")


SEGMENT = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=8)
TRICKS = st.sampled_from(["..", ".", "", "%2e%2e", "%2F", "\\", "@", "?", "#", ":", "\t", "\u2024", "\uff0e", ";", "::"])


@given(st.lists(SEGMENT, min_size=1, max_size=4), st.lists(SEGMENT, min_size=1, max_size=6))
def test_a_list_allows_exactly_what_has_its_segments_first(listed, asked):
    beginning, uri = "pvc://" + "/".join(listed), "pvc://" + "/".join(asked)
    assert allows([beginning], uri) == (asked[: len(listed)] == listed)
    assert allows([beginning + "/"], uri) == allows([beginning], uri)


@given(st.lists(SEGMENT | TRICKS, min_size=1, max_size=6), st.sampled_from(["hf", "s3", "pvc", "https"]))
def test_whatever_is_mixed_in_a_path_never_leaves_the_beginning(parts, scheme):
    """What is allowed and what a job may say at all has the beginning's segments first, as whoever resolves it splits it."""
    uri = f"{scheme}://Qwen/{'/'.join(parts)}"
    assume(allows([f"{scheme}://Qwen"], uri))
    segments = uri.split("://", 1)[1].split("/")
    assert segments[0] == "Qwen"
    assert ".." not in segments
    assert "%" not in uri


@given(st.from_regex(rf"\A(?:{MODEL_URI[1:-1]}|{DATA_URI[1:-1]}|{STORAGE_URI[1:-1]})\Z"))
def test_every_uri_that_a_job_may_name_has_one_spelling(uri):
    """So that a list of everything below its own first segment allows it: nothing is refused for its form alone."""
    assume(".." not in uri)
    scheme, rest = uri.split("://")
    assert allows([f"{scheme}://{rest.split('/')[0]}"], uri)


@given(st.from_regex(rf"\A{ENDPOINT_URL[1:-1]}\Z"))
def test_every_endpoint_that_a_job_may_name_has_one_spelling(url):
    assume(".." not in url)
    found = canonical(url)
    assert found is not None
    assert re.fullmatch(r"[a-z0-9.-]+(:[0-9]+)?", found[1][0])
