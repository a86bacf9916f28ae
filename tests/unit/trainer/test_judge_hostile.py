"""A judge and a generator whose server misbehaves: each way over real HTTP, for both, since both ask in the same way."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity
from fake_endpoint import FakeEndpoint, Late, Truncated, chat, echo
from fsspec.implementations.local import LocalFileSystem

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Endpoint
from finetune_trainer import endpoint
from finetune_trainer.asking import Served, served
from finetune_trainer.data.cases import Case
from finetune_trainer.endpoint_generator import EndpointGenerator, generator_at
from finetune_trainer.errors import JobError
from finetune_trainer.judge import Judge, judge_at
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage

KEY = "sk-the-key-of-the-judge"
FIELDS = {"judge": "evaluation.suites[0].judge.endpoint", "generator": "data.preparation.contentPoints.generator.endpoint"}
REASONS = {"judge": Reason.JUDGE_UNAVAILABLE, "generator": Reason.GENERATOR_UNAVAILABLE}
PROBES = [1]
"""The most tokens that a probe asks for."""


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRY_WAIT", tenacity.wait_none())


@pytest.fixture(params=["judge", "generator"])
def who(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ask(who: str, folder: Path, reply: Any, *, said: list[str] | None = None, **fields: Any) -> Any:
    """What the judge makes of one answer, or the generator of one prompt: of a good server 1.0, and Verdict: 10."""
    storage, told = Storage(LocalFileSystem(), str(folder), f"file://{folder}"), said if said is not None else []
    with FakeEndpoint(reply) as server:
        given = Endpoint.model_validate_json(
            json.dumps({"url": server.url, "model": "large", "secretRef": {"name": "judge"}, "concurrency": 1, **fields})
        )
        if who == "judge":
            with Judge(Served(given, KEY, judge_at(FIELDS[who])), "", storage, "team", told.append) as judge:
                return judge.scores([Case("1", "right", prompt="What?")], ["text"]).per_case[0]
        with EndpointGenerator(Served(given, KEY, generator_at(FIELDS[who])), storage, "team", told.append) as generator:
            return next(generator.generate([({"role": "user", "content": "What?"},)], 64))


def good(who: str) -> Any:
    return 1.0 if who == "judge" else "Verdict: 10"


def once(*first: Any) -> Any:
    """A server that gives these in answer to the first questions (not probes), and then a good one."""
    left = iter(first)

    def reply(path: str, body: dict[str, Any]) -> Any:
        return (200, {}, chat("Hello")) if body["max_tokens"] in PROBES else next(left, (200, {}, chat("Verdict: 10")))

    return reply


def always(answer: Any) -> Any:
    return lambda path, body: (200, {}, chat("Hello")) if body["max_tokens"] in PROBES else answer


def failure(who: str, folder: Path, reply: Any, reason: Reason | None = None, **fields: Any) -> str:
    """The message, which names the field and not the key."""
    with pytest.raises(JobError) as caught:
        ask(who, folder, reply, **fields)
    assert caught.value.reason == (reason or REASONS[who])
    assert caught.value.message.startswith(FIELDS[who])
    assert KEY not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    "bad",
    [
        (500, {}, "oops"),
        (503, {}, {"error": {"message": "loading"}}),
        (408, {}, ""),
        (429, {"Retry-After": "0"}, "slow down"),
        (200, {}, Truncated(chat("Verdict: 1"))),
    ],
    ids=["500", "503", "408", "429", "truncated"],
)
def test_what_passes_is_waited_for(who: str, bad: Any, tmp_path: Path) -> None:
    assert ask(who, tmp_path, once(bad, bad)) == good(who)


def test_a_call_to_wait_without_a_time(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """429 without Retry-After: some seconds, which are not waited here."""
    monkeypatch.setattr(endpoint, "seconds_in", lambda asked: 0.01 if asked is None else 1e9)
    assert ask(who, tmp_path, once((429, {}, "slow down"))) == good(who)


def test_a_call_to_wait_is_told_in_its_own_name(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "TELL_SECONDS", 0.05)
    said: list[str] = []
    assert ask(who, tmp_path, once((429, {"Retry-After": "0.1"}, "quota")), said=said) == good(who)
    assert said[0] == f"the {who} has too many requests (429) and asks to wait 0 s (quota)"


def test_an_answer_that_comes_too_late_is_asked_for_again(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(endpoint, "SECONDS_FOR_TOKEN", 0.0)
    assert ask(who, tmp_path, once((200, {}, Late(1.5, chat("Verdict: 1"))))) == good(who)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ((500, {}, "oops"), "answers 500 (oops), 6 times"),
        ((200, {}, Truncated(chat("Verdict: 1"))), "does not answer (ClientPayloadError: "),
        ((200, {}, '{"choices": [{"message"'), "something else than JSON: "),
        ((200, {}, "data: {}\n\n"), "something else than JSON: data: {}"),
        ((200, {}, {"choices": []}), "did not answer as OpenAI's interface does"),
        ((200, {}, {"choices": [{"message": {"content": ["Verdict: 10"]}}]}), "did not answer as OpenAI's interface does"),
        ((200, {}, {"choices": [{"message": {"content": 10}}]}), "did not answer as OpenAI's interface does"),
        ((200, {}, "[" * 50_000), "something else than JSON"),
        ((200, {}, b"\xff\xfe\x00"), "something else than JSON"),
        ((404, {}, "no such model"), "answers 404 (no such model): check url"),
        ((307, {"Location": f"http://127.0.0.1:1/{KEY}"}, ""), "leads on to http://127.0.0.1:1/***, which is not followed"),
    ],
)
def test_what_stays_ends_the_job(who: str, tmp_path: Path, bad: Any, words: str) -> None:
    assert words in failure(who, tmp_path, always(bad))


def test_a_server_that_always_asks_to_wait(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PATIENCE", 0.15)
    assert "answers 429 for 0 s (quota): lower concurrency" in failure(
        who, tmp_path, always((429, {"Retry-After": "0"}, {"error": "quota"}))
    )


@pytest.mark.parametrize("status", [401, 403])
def test_the_wrong_key(who: str, tmp_path: Path, status: int) -> None:
    message = failure(who, tmp_path, lambda path, body: (status, {}, f"{KEY} is wrong"), Reason.AUTHENTICATION_FAILED)
    assert "the key `token` of the Secret judge is not accepted (*** is wrong)" in message


def test_a_key_that_is_not_there(who: str, tmp_path: Path) -> None:
    spec = Endpoint.model_validate_json('{"url": "http://nowhere/v1", "model": "large", "secretRef": {"name": "judge"}}')
    with pytest.raises(JobError) as caught:
        served(spec, judge_at("here"), Mounts(tmp_path))
    assert caught.value.reason == Reason.SECRET_NOT_FOUND
    (tmp_path / "secrets" / "judge").mkdir(parents=True)
    (tmp_path / "secrets" / "judge" / "token").write_text(KEY + "\n")
    assert served(spec, judge_at("here"), Mounts(tmp_path)).key == KEY


def test_an_answer_longer_than_any_could_be(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "ANSWER_BYTES", 1000)
    message = failure(who, tmp_path, always((200, {}, chat("a" * 60_000))), maxTokens=16)
    assert "answers with more than 5,096 bytes, which maxTokens (16) cannot need" in message


def test_a_link_local_address(who: str, tmp_path: Path) -> None:
    assert "169.254.169.254, a link-local address" in failure(who, tmp_path, echo, Reason.INVALID_SPEC, url="http://169.254.169.254/v1")


def test_a_redirect_gets_no_key(who: str, tmp_path: Path) -> None:
    with FakeEndpoint(echo) as elsewhere:
        failure(who, tmp_path, always((302, {"Location": elsewhere.url}, "")))
    assert elsewhere.asked == []


def test_what_is_kept_holds_no_key(who: str, tmp_path: Path) -> None:
    ask(who, tmp_path, once())
    kept = list(files(tmp_path))
    assert any("Verdict: 10" in text for text in kept)
    assert not any(KEY in text for text in kept)


def files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*.json"):
        yield path.read_text()
