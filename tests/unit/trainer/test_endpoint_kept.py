"""What a served teacher has answered is paid for: it is kept whatever happens, found again, and held on disk."""

import base64
import json
import os
import shutil
import signal
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import tenacity
from endpoint_site import Site
from fake_endpoint import FakeEndpoint, completion, echo
from tiny_models import byte_tokenizer

from finetune_api.v1alpha1 import Endpoint
from finetune_trainer import data_cache, endpoint
from finetune_trainer.asking import Asker, Count, Served, batch_size
from finetune_trainer.completions import Question
from finetune_trainer.data.examples import open_prepared
from finetune_trainer.endpoint import TEACHER
from finetune_trainer.endpoint_answers import endpoint_teacher
from finetune_trainer.errors import JobError
from finetune_trainer.interruption import InterruptedRunError
from finetune_trainer.sources import Mounts


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRY_WAIT", tenacity.wait_none())


WORDS = [{"prompt": f"{word} ", "completion": "own"} for word in ("one", "two", "three")]


def test_what_was_answered_is_kept_though_another_question_ends_all(tmp_path: Path) -> None:
    """The answers of a batch are paid for one by one: the next attempt asks only for the one that failed."""
    site = Site(tmp_path, byte_tokenizer(), *WORDS)

    def reply(path: str, body: dict[str, Any]) -> Any:
        return (503, {}, "gone") if body["prompt"] == "three " else echo(path, body)

    with FakeEndpoint(reply) as server:
        with pytest.raises(JobError, match=r"answers 503 \(gone\), 6 times, at the prompt of file:.*/train\.jsonl, line 3$"):
            site.prepare(server.url)
        server.reply = echo
        server.asked.clear()
        site.prepare(server.url)
        assert [body["prompt"] for body in server.questions()] == ["three "]


def packed(tokens: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(tokens).encode())).decode()


ODD: dict[str, Any] = {
    "a text": "yes",
    "nothing": None,
    "no text": {"text": 7, "cut": False, "tokens": ""},
    "no tokens": {"text": "yes", "cut": False},
    "tokens that are not packed": {"text": "yes", "cut": False, "tokens": [["a", []]]},
    "no base64": {"text": "yes", "cut": False, "tokens": "?"},
    "not packed by zlib": {"text": "yes", "cut": False, "tokens": "YQ=="},
    "other tokens": {"text": "yes", "cut": False, "tokens": packed([["a", 7]])},
    "a character that is no byte": {"text": "yes", "cut": False, "tokens": packed([["\u2603", []]])},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_is_kept_in_another_form_is_asked_again(tmp_path: Path, odd: Any) -> None:
    site = Site(tmp_path, byte_tokenizer(), *WORDS)
    with FakeEndpoint(echo) as server:
        before = site.texts(site.prepare(server.url))
        (kept,) = (tmp_path / "out" / ".finetune/cache/answers").glob("*/*.json")
        kept.write_text(json.dumps(dict.fromkeys(json.loads(kept.read_text()), odd)))
        shutil.rmtree(tmp_path / "out" / ".finetune/cache/data")
        server.asked.clear()
        assert site.texts(site.prepare(server.url)) == before
        assert len(server.questions()) == 3


def test_another_namespaces_server_of_the_same_name_is_another(tmp_path: Path) -> None:
    """http://teacher/v1 is a Service of the job's own namespace, and output.storage may be a bucket of several."""
    site = Site(tmp_path, byte_tokenizer(), *WORDS)
    with FakeEndpoint(lambda path, body: (200, {}, completion("poison"))) as server:
        site.prepare(server.url)
        server.reply = echo
        own = site.job(server.url)
        theirs = own.model_copy(update={"metadata": own.metadata.model_copy(update={"namespace": "other"})})
        mounts = Mounts(tmp_path, local=True)
        teacher = endpoint_teacher(theirs, site.tokenizer, mounts, site.storage, site.said.append)
        entry = data_cache.find_or_prepare(site.storage, theirs, mounts, site.tokenizer, None, teacher)
        prepared = open_prepared(site.storage.location(entry.name), tmp_path / "cache")
    assert [text for _, text in site.texts(prepared)] == ["ONE <eos>", "TWO <eos>", "THREE <eos>"]


def test_what_is_known_is_not_in_memory(tmp_path: Path) -> None:
    """200 answers of 64 KiB, in batches of 128: far less than their 13 MB are held when they come from what is kept."""
    site = Site(tmp_path, byte_tokenizer(), *({"prompt": f"{number} ", "completion": "own"} for number in range(200)))
    with FakeEndpoint(lambda path, body: (200, {}, completion(body["prompt"] * (65536 // len(body["prompt"]))))) as server:
        questions = [Question(prompt=f"{number} ") for number in range(200)]
        with Asker(Served(Endpoint(url=server.url, model="large"), None, TEACHER), site.storage, Count(), site.said.append) as asker:
            asker.answers(questions)
    with Asker(Served(Endpoint(url="http://nowhere/v1", model="large"), None, TEACHER), site.storage, Count(), site.said.append) as asker:
        asker.answers(questions[:1])
        tracemalloc.start()
        for question in questions:
            (answer,) = asker.answers([question])
            assert answer is not None
            assert answer.text.startswith(str(question.prompt))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 128),
        ({"concurrency": 256}, 4096),
        ({"concurrency": 8, "top_logprobs": 20, "max_tokens": 512}, 97),
        ({"concurrency": 64, "top_logprobs": 20, "max_tokens": 65536}, 64),
        ({"top_logprobs": 1, "max_tokens": 16}, 128),
    ],
)
def test_a_batch_of_probabilities_is_one_that_fits_into_memory(fields: dict[str, Any], expected: int) -> None:
    """97 answers of 512 tokens, each with itself and 20 others: 1,042,944 of 1,048,576."""
    assert batch_size(Endpoint(url="http://host/v1", model="large", **fields)) == expected


def test_a_call_to_stop_loses_nothing_that_is_paid_for(tmp_path: Path) -> None:
    """SIGTERM comes between two answers, and raises in the middle of whatever the main thread does."""
    site = Site(tmp_path, byte_tokenizer(), *WORDS)

    def reply(path: str, body: dict[str, Any]) -> Any:
        if body["max_tokens"] != 1 and len(server.questions()) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return echo(path, body)

    def stop(number: int, frame: Any) -> None:
        raise InterruptedRunError

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with FakeEndpoint(reply) as server:
            with pytest.raises(InterruptedRunError):
                site.prepare(server.url, concurrency=1)
            server.reply = echo
            server.asked.clear()
            site.prepare(server.url)
            assert [body["prompt"] for body in server.questions()] == ["three "]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_probabilities_come_back_from_what_is_kept(tmp_path: Path) -> None:
    """Packed: what is kept is smaller than the probabilities as they are written, and gives the same targets."""
    tops = {character: -0.123456 - place for place, character in enumerate("abcdefghijklmnopqrst")}
    logprobs = {"tokens": ["a"] * 50, "top_logprobs": [tops] * 50}
    site = Site(tmp_path, byte_tokenizer(), *WORDS)
    with FakeEndpoint(lambda path, body: (200, {}, completion("a" * 50, logprobs=logprobs))) as server:
        first = site.prepare(server.url, topLogprobs=20)
        beside = [path.read_bytes() for path in sorted((tmp_path / "out" / site.entry.name / "teacher").rglob("*.npy"))]
        (kept,) = (tmp_path / "out" / ".finetune/cache/answers").glob("*/*.json")
        assert kept.stat().st_size < len(json.dumps(logprobs))
        shutil.rmtree(tmp_path / "out" / ".finetune/cache/data")
        server.asked.clear()
        again = site.prepare(server.url, topLogprobs=20)
        assert server.questions() == []
    assert again.digest == first.digest
    assert len(beside) == 6
    assert [path.read_bytes() for path in sorted((tmp_path / "out" / site.entry.name / "teacher").rglob("*.npy"))] == beside
