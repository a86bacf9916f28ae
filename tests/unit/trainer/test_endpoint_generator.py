"""A generator behind an endpoint, as the making of examples asks it."""

from pathlib import Path
from typing import Any

import pytest
import tenacity
from fake_endpoint import FakeEndpoint, chat, echo
from fsspec.implementations.local import LocalFileSystem

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Endpoint
from finetune_trainer import asking, endpoint
from finetune_trainer.asking import Served
from finetune_trainer.endpoint_generator import EndpointGenerator, generator_at
from finetune_trainer.errors import JobError
from finetune_trainer.storage import Storage

FIELD = "data.preparation.questions.generator.endpoint"


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRY_WAIT", tenacity.wait_none())


def generator(folder: Path, url: str, said: list[str], **fields: Any) -> EndpointGenerator:
    storage = Storage(LocalFileSystem(), str(folder), f"file://{folder}")
    return EndpointGenerator(Served(Endpoint(url=url, model="large", **fields), None, generator_at(FIELD)), storage, "team", said.append)


def turns(*words: str) -> list[tuple[dict[str, str], ...]]:
    return [({"role": "system", "content": "Shout."}, {"role": "user", "content": word}) for word in words]


def test_texts_come_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    said: list[str] = []
    with FakeEndpoint(echo) as server, generator(tmp_path, server.url, said, max_tokens=100) as writer:
        assert list(writer.generate(turns("one", "two", "one"), 64)) == ["ONE", "TWO", "ONE"]
        assert {body["max_tokens"] for body in server.questions()} == {64}
        assert [message["role"] for message in server.questions()[0]["messages"]] == ["system", "user"]
        assert list(writer.generate(turns("three"), 512)) == ["THREE"]
        assert server.questions()[-1]["max_tokens"] == 100
    assert said == [
        "the generator has answered 3 of 3 prompts (0 of them before)",
        "the generator has answered 4 of 4 prompts (0 of them before)",
    ]


def test_texts_come_as_they_are_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch after batch: what follows them need not wait for all, and nothing is asked for that nobody takes."""
    monkeypatch.setattr(asking, "BATCH", 2)
    monkeypatch.setattr(asking, "PER_REQUEST", 0)
    with FakeEndpoint(echo) as server, generator(tmp_path, server.url, []) as writer:
        texts = writer.generate(turns("one", "two", "three"), 8)
        assert next(texts) == "ONE"
        assert len(server.questions()) == 2
        assert list(texts) == ["TWO", "THREE"]


def test_what_was_written_is_not_paid_for_again(tmp_path: Path) -> None:
    said: list[str] = []
    with FakeEndpoint(echo) as server:
        with generator(tmp_path, server.url, said) as writer:
            list(writer.generate(turns("one", "two"), 8))
        server.asked.clear()
        with generator(tmp_path, server.url, said) as writer:
            assert list(writer.generate(turns("two", "one", "three"), 8)) == ["TWO", "ONE", "THREE"]
            assert len(server.questions()) == 1
            list(writer.generate(turns("two"), 9))
            assert len(server.questions()) == 2  # with more tokens, it may say more
    assert said[1] == "the generator has answered 3 of 3 prompts (2 of them before)"


def test_refused_and_empty_texts_are_empty_and_told(tmp_path: Path) -> None:
    def reply(path: str, body: dict[str, Any]) -> Any:
        asked = body["messages"][-1]["content"]
        if asked == "long":
            return 400, {}, {"error": {"message": "too long"}}
        return 200, {}, chat(" \n" if asked == "silent" else "yes", "length")

    said: list[str] = []
    with FakeEndpoint(reply) as server, generator(tmp_path, server.url, said) as writer:
        assert list(writer.generate(turns("long", "silent", "short"), 8)) == ["", "", "yes"]
    assert said == [
        "the generator has answered 1 of 3 prompts (0 of them before); 1 refused, the first with 400 (too long), 1 empty; "
        "1 answers are cut off at maxTokens"
    ]


def test_a_generator_that_writes_nothing_fails_the_job(tmp_path: Path) -> None:
    def reply(path: str, body: dict[str, Any]) -> Any:
        return 200, {}, chat("" if body["max_tokens"] > 1 else "Hello")

    with FakeEndpoint(reply) as server, generator(tmp_path, server.url, []) as writer, pytest.raises(JobError) as caught:
        list(writer.generate(turns("one", "two"), 8))
    assert caught.value.reason == Reason.GENERATOR_UNAVAILABLE
    assert caught.value.message == (
        f"{FIELD}: large has answered none of 2 prompts: 2 empty; check model, and maxTokens where it reasons first"
    )
