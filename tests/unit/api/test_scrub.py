"""What must not be read by others does not come out, and what must be read does."""

import string
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_api import scrub as module
from finetune_api.scrub import brief, hide, last_lines, scrub

CORE = "Zq7Rk2Wx9Tb4Vn6M"
"""Sixteen characters that stand in every canary; none of them may be seen again."""
AWS_KEY = f"{CORE}/{CORE}+aB3dE5"
assert len(AWS_KEY) == 40

CANARIES = [
    f"hf_{CORE}{CORE}",
    f"using token hf_oauth_{CORE}",
    f"AKIA{CORE.upper()}",
    f"ASIA{CORE.upper()}",
    f"aws_secret_access_key = {AWS_KEY}",
    f"AWS_SECRET_ACCESS_KEY={AWS_KEY}",
    f"secretAccessKey: {AWS_KEY}",
    f'{{"SecretAccessKey": "{AWS_KEY}"}}',
    f"key {AWS_KEY} was refused",
    f"AWS_SESSION_TOKEN={CORE}{CORE}",
    f"Authorization: Bearer {CORE}",
    f"authorization: bearer {CORE}",
    f"Authorization: Basic {CORE}==",
    f"Authorization: {CORE}",
    f"'Authorization': 'Bearer {CORE}'",
    f'"authorization":"{CORE}"',
    f"X-Ray-Authorization: Bearer {CORE}",
    f"Bearer {CORE} was given",
    f"sk-{CORE}{CORE}",
    f"sk-proj-{CORE}-{CORE}",
    f"sk-ant-api03-{CORE}",
    f"github_pat_{CORE}_{CORE}",
    f"ghp_{CORE}{CORE}",
    f"gho_{CORE}{CORE}",
    f"ghs_{CORE}{CORE}",
    f"glpat-{CORE}",
    f"https://user:{CORE}@host/path",
    f"https://{CORE}@github.com/owner/name",
    f"postgres://admin:{CORE}@db:5432/x",
    f"https://user:p@ss{CORE}@host",
    f"https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4&X-Amz-Signature={CORE}",
    f"https://b.s3.amazonaws.com/k?X-Amz-Credential={CORE}%2F20260101&x=1",
    f"https://b.s3.amazonaws.com/k?X-Amz-Security-Token={CORE}&v=1",
    f"https://b.s3.amazonaws.com/k?AWSAccessKeyId=x&Signature={CORE}&Expires=1",
    f"https://storage.googleapis.com/b/o?X-Goog-Signature={CORE}",
    f"https://a.blob.core.windows.net/c/b?sv=2022&sig={CORE}%3D",
    f"https://hub/api?token={CORE}",
    f"https://generativelanguage/api?key={CORE}",
    f"eyJhbGciOiJIUzI1NiJ9.{CORE}.{CORE}",
    f"eyJhbGciOiJub25lIn0.{CORE}.",
    f"-----BEGIN PRIVATE KEY-----\n{CORE}\n{CORE}\n-----END PRIVATE KEY-----",
    f"-----BEGIN RSA PRIVATE KEY-----\n{CORE}\n-----END RSA PRIVATE KEY-----",
    f"-----BEGIN OPENSSH PRIVATE KEY-----\n{CORE}\ncut off here",
    f"password={CORE}",
    f"PGPASSWORD: {CORE}",
    f"api_key={CORE}",
    f'"api_key": "{CORE}"',
    f"WANDB_API_KEY={CORE}",
    f"client_secret={CORE}",
    f"HF_TOKEN={CORE}",
    f"access_token: {CORE}",
    f'{{"token": "{CORE}"}}',
    f"xoxb-{CORE}",
    f"AIzaSy{CORE}{CORE}",
    f"ya29.{CORE}",
    f"pypi-{CORE}{CORE}",
    f"npm_{CORE}{CORE}",
    f"nvapi-{CORE}",
    f"private_key: {CORE}",
    f"RAY_AUTH_TOKEN={CORE}",
]


def test_there_are_fifty_of_them() -> None:
    assert len(set(CANARIES)) >= 50


@pytest.mark.parametrize("secret", CANARIES)
@pytest.mark.parametrize("frame", ["{}", "could not read with {} at all", "line 1\n{}\nline 3", 'it said "{}"', "\x1b[31m{}\x1b[0m"])
def test_no_secret_comes_out(secret: str, frame: str) -> None:
    text = frame.format(secret)
    assert "***" in scrub(text)
    for clean in (scrub(text), *(cut(text, limit) for cut in (brief, last_lines) for limit in (20, 60, 100))):
        assert CORE not in clean
        assert CORE.upper() not in clean


PLAIN = [
    "train.jsonl, line 3: s3://bucket/key of pvc://claim/a",
    'secret "hub" not found',
    "references non-existent secret key: token",
    "sha256:ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12",
    "revision 5a6f0c1e5a6f0c1e5a6f0c1e5a6f0c1e5a6f0c1e",
    "hf://datasets/owner/name@5a6f0c1e",
    "step 12/600  loss 1.23  lr 1.8e-04  2,310 tok/s",
    "the token <|eos|> is not in the tokenizer; max_tokens=128, tokens: 15",
    "the bearer of bad news",
    "/mnt/finetune/claims/models/Llama3/weights1",
    "pod bot-1-head: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    "signatures of 12 functions, 3 keys",
    'column "password" is missing',
    "training.learningRate: must be a number\n\twith a tab",
]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_words_stay(text: str) -> None:
    assert scrub(text) == text


PIECES = st.one_of(
    st.text(max_size=30),
    st.sampled_from(CANARIES),
    st.sampled_from(
        ["Bearer ", "authorization: ", "://", "@", "=", "token=", "***", "-----BEGIN PRIVATE KEY-----", "\x1f", "\u2028", " ", "\n"]
    ),
    st.text(alphabet=string.ascii_letters + string.digits + "/+", min_size=38, max_size=42),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)


@given(TEXTS)
@example("Bearer a\x1fb")
@example("://a:b@c:d@e")
def test_scrubbing_twice_changes_nothing(text: str) -> None:
    assert scrub(scrub(text)) == scrub(text)


@given(TEXTS, st.integers(0, 80))
def test_nothing_is_longer_than_its_bound(text: str, limit: int) -> None:
    assert len(brief(text, limit)) <= limit
    assert len(last_lines(text, limit)) <= limit


@given(TEXTS)
def test_what_comes_out_can_be_written_and_rules_no_terminal(text: str) -> None:
    clean = scrub(text)
    clean.encode()
    assert {sign for sign in clean if unicodedata.category(sign) in ("Cc", "Cs")} <= {"\n", "\t"}


def test_a_bound_that_falls_into_a_secret_leaves_no_half_of_it() -> None:
    text = "x" * 50 + f" hf_{CORE}{CORE}"
    assert brief(text, 55) == "x" * 50 + " ***"
    assert brief(text, 53) == "x" * 50 + " *…"
    assert last_lines(f"hf_{CORE}{CORE} " + "y" * 50, 52) == "* " + "y" * 50


def test_what_a_process_knows_for_a_secret_is_hidden_whatever_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", ())
    for secret in ("correct horse/battery", "correct horse", "short", ""):
        hide(secret)
    said = "no key: correct horse/battery, also as ?key=correct%20horse%2Fbattery, nor correct horse; a short one"
    assert scrub(said) == "no key: ***, also as ?key=***, nor ***; a short one"


def test_the_last_lines_begin_with_a_whole_line() -> None:
    log = "\n".join(f"line {number}" for number in range(100)) + "\n    ~~~^^^\n\n"
    assert last_lines(log, 20) == "line 98\nline 99"
    assert last_lines("short\n", 20) == "short"
    assert last_lines("", 20) == ""


def test_a_long_text_is_scrubbed_quickly() -> None:
    for text in ("a" * 200_000, "x_" * 100_000, "Bearer " * 30_000, "://" * 60_000, "-----BEGIN PRIVATE KEY-----" * 2000, "token" * 40_000):
        assert len(scrub(text)) <= len(text)
