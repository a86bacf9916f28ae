"""A measuring run of an endpoint: what is served is asked anew in every run, and a server that misbehaves does it no harm."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity
from fake_endpoint import FakeEndpoint, Late, Truncated, chat, completion
from tests.builders import raw_job
from tests.in_process import Finished, run_job

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer import crew, endpoint
from finetune_trainer.errors import JobError

ROWS = [("ten", "ten"), ("two", "two red"), ("six", "six"), ("one", "never")]
"""What is asked, and the golden answer."""


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRY_WAIT", tenacity.wait_none())
    monkeypatch.setattr(crew.Crew, "run", lambda *_, **__: pytest.fail("workers were asked for"))


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    for claim in ("data", "out"):
        (tmp_path / "claims" / claim).mkdir(parents=True)
    write(tmp_path, ROWS)
    (tmp_path / "secrets" / "served").mkdir(parents=True)
    (tmp_path / "secrets" / "served" / "token").write_text("sk-served")
    return tmp_path


def write(volumes: Path, rows: list[tuple[str, str]]) -> None:
    lines = (json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in rows)
    (volumes / "claims" / "data" / "fresh.jsonl").write_text("".join(lines))


def a_job(url: str, metrics: list[str], **fields: Any) -> FineTuneJob:
    """A job whose model, training data and published artifact are all gone: an endpoint needs none of them."""
    suite = {"name": "task", "source": "validation", "metrics": metrics, "maxNewTokens": 9}
    served = {"url": url, "model": "bot", "secretRef": {"name": "served"}, **fields}
    plan = {"schedule": "0 3 * * *", "suites": [{"name": "task", "source": "pvc://data/fresh.jsonl"}], "endpoint": served}
    manifest = raw_job(
        uid="served",
        model={"source": "pvc://gone/model"},
        data={"train": {"source": "pvc://gone/train.jsonl"}},
        output={"storage": "pvc://out/bot"},
        evaluation={"suites": [suite]},
        monitoring=plan,
    )
    return parse_job({key: value for key, value in manifest.items() if key != "status"})


def echoed(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """Says back what it is asked."""
    assert path == "/completions"
    return 200, {}, completion(body["prompt"])


@pytest.fixture
def attempts() -> Iterator[int]:
    return iter(range(2, 99))


def figures(done: Finished) -> dict[str, float | None]:
    return {each.metric: each.value for each in done.report.fresh}


def test_the_figures_are_those_of_what_is_said(volumes: Path, monkeypatch: pytest.MonkeyPatch, attempts: Iterator[int]) -> None:
    """Four answers: two are exact; F1 of `two` against `two red` is 2 * 1 * 0.5 / 1.5 = 2/3, of `one` against `never` 0."""
    with FakeEndpoint(echoed) as server:
        job = a_job(server.url, ["loss", "exactMatch", "f1"])
        done = run_job(job, volumes, monkeypatch, attempt=next(attempts))
        assert figures(done) == {"task/exactMatch": 0.5, "task/f1": pytest.approx((1 + 2 / 3 + 1 + 0) / 4)}
        assert [each.n for each in done.report.fresh] == [4, 4]
        assert all(each.low is not None and each.high is not None for each in done.report.fresh)
        assert {(body["max_tokens"], key) for _, body, key in server.asked if body["max_tokens"] != 1} == {(9, "Bearer sk-served")}
        assert len(server.questions()) == 4
        # The same questions once more: what was said before says nothing of what is served now.
        server.reply = lambda path, body: (200, {}, completion("ten"))
        again = run_job(job, volumes, monkeypatch, attempt=next(attempts))
        assert figures(again)["task/exactMatch"] == 0.25
        assert len(server.questions()) == 8
        # And the source has grown.
        write(volumes, [*ROWS, ("ten", "ten"), ("a", "ten")])
        grown = run_job(job, volumes, monkeypatch, attempt=next(attempts))
        assert [each.n for each in grown.report.fresh] == [6, 6]
        assert figures(grown)["task/exactMatch"] == 0.5


def test_conversations_are_asked_as_such(volumes: Path, monkeypatch: pytest.MonkeyPatch, attempts: Iterator[int]) -> None:
    turns = [{"role": "system", "content": "Shout."}, {"role": "user", "content": "ten"}, {"role": "assistant", "content": "TEN"}]
    (volumes / "claims" / "data" / "fresh.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with FakeEndpoint(lambda _, body: (200, {}, chat(body["messages"][-1]["content"].upper()))) as server:
        done = run_job(a_job(server.url, ["exactMatch"]), volumes, monkeypatch, attempt=next(attempts))
        assert figures(done) == {"task/exactMatch": 1.0}
        (question,) = server.questions()
        assert question["messages"] == turns[:2]


def sometimes(fault: Any) -> Callable[[str, dict[str, Any]], tuple[int, dict[str, str], Any]]:
    """Every first answer to a question is a fault."""
    seen: set[str] = set()

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if body["prompt"] not in seen:
            seen.add(body["prompt"])
            return fault
        return echoed(path, body)

    return reply


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"Retry-After": "0"}, "slow down"),
        (500, {}, "oops"),
        (200, {}, Truncated(completion("ten"))),
        (503, {}, Late(0.2, {})),
    ],
    ids=["429", "500", "truncated", "late"],
)
def test_a_server_that_misbehaves_now_and_then_is_asked_again(
    fault: Any, volumes: Path, monkeypatch: pytest.MonkeyPatch, attempts: Iterator[int]
) -> None:
    with FakeEndpoint(sometimes(fault)) as server:
        done = run_job(a_job(server.url, ["exactMatch"]), volumes, monkeypatch, attempt=next(attempts))
    assert figures(done) == {"task/exactMatch": 0.5}


def test_a_refused_prompt_counts_as_nothing_said(volumes: Path, monkeypatch: pytest.MonkeyPatch, attempts: Iterator[int]) -> None:
    with FakeEndpoint(lambda path, body: (400, {}, "no") if body["prompt"] == "ten" else echoed(path, body)) as server:
        done = run_job(a_job(server.url, ["exactMatch"]), volumes, monkeypatch, attempt=next(attempts))
    assert figures(done) == {"task/exactMatch": 0.25}


@pytest.mark.parametrize(
    ("reply", "reason", "words"),
    [
        (lambda *_: (401, {}, "who are you"), Reason.AUTHENTICATION_FAILED, "monitoring.endpoint"),
        (lambda *_: (404, {}, "no such model"), Reason.ENDPOINT_UNAVAILABLE, "monitoring.endpoint"),
        (
            lambda *_: (200, {}, completion("")),
            Reason.ENDPOINT_UNAVAILABLE,
            "has answered none of the 4 prompts of the suite task: 4 empty",
        ),
        (lambda *_: (200, {}, "{not json"), Reason.ENDPOINT_UNAVAILABLE, "something else than JSON"),
        (lambda *_: (200, {}, {"choices": []}), Reason.ENDPOINT_UNAVAILABLE, "monitoring.endpoint"),
    ],
    ids=["401", "404", "silent", "malformed", "empty"],
)
def test_a_server_that_never_answers_ends_the_run(
    reply: Any, reason: Reason, words: str, volumes: Path, monkeypatch: pytest.MonkeyPatch, attempts: Iterator[int]
) -> None:
    with FakeEndpoint(reply) as server, pytest.raises(JobError) as failed:
        run_job(a_job(server.url, ["exactMatch"]), volumes, monkeypatch, attempt=next(attempts))
    assert failed.value.reason == reason
    assert words in failed.value.message
