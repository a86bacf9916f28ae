"""A served teacher against a server on this machine: what it answers, refuses, delays and garbles."""

import asyncio
import json
import time
from collections.abc import Sequence
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tenacity
import torch
from endpoint_site import KEY, PROMPTS, Site
from fake_endpoint import FakeEndpoint, chat, completion, echo
from tiny_models import byte_tokenizer, write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Endpoint
from finetune_trainer import endpoint
from finetune_trainer.completions import Answer, Question, Token
from finetune_trainer.endpoint import RefusedQuestionError, ServedModel, answers, seconds_in
from finetune_trainer.errors import JobError
from finetune_trainer.objectives.distillation.teacher_cache import TeacherCache
from finetune_trainer.teacher import BESIDE_DATA

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRY_WAIT", tenacity.wait_none())


def ask(
    url: str, *questions: Question, key: str | None = KEY, probe: bool | None = None, **fields: Any
) -> list[Answer | RefusedQuestionError]:
    """The answers; `probe` asks for one token first, as a chat or not."""
    given: dict[str, Any] = {"secretRef": {"name": "teacher"}} if key else {}
    spec = Endpoint.model_validate_json(json.dumps({"url": url, "model": "large", **given, **fields}))

    async def all_of_it() -> list[Answer | RefusedQuestionError]:
        async with ServedModel(spec, key) as model:
            if probe is not None:
                await model.probe(chat=probe)
            return await answers(model, questions)

    return asyncio.run(all_of_it())


def failure(reply: Any, *questions: Question, **fields: Any) -> JobError:
    with FakeEndpoint(reply) as server, pytest.raises(JobError) as caught:
        ask(server.url, *(questions or (Question(prompt="a"),)), **fields)
    assert KEY not in caught.value.message
    assert "objective.distillation.teacher.endpoint" in caught.value.message
    return caught.value


def test_prompts_and_conversations_are_answered_in_their_order() -> None:
    conversation = ({"role": "system", "content": "Shout."}, {"role": "user", "content": "hi"})
    with FakeEndpoint(echo) as server:
        made = ask(
            server.url, Question(prompt="one "), Question(messages=conversation), Question(prompt="two"), maxTokens=7, temperature=0.5
        )
    assert made == [Answer("ONE "), Answer("HI"), Answer("TWO")]
    bodies = {path: body for path, body, _ in server.asked}
    common = {"model": "large", "max_tokens": 7, "temperature": 0.5, "stream": False}
    assert bodies["/chat/completions"] == common | {"messages": list(conversation)}
    assert sorted(body["prompt"] for path, body, _ in server.asked if path == "/completions") == ["one ", "two"]
    assert {key for *_, key in server.asked} == {f"Bearer {KEY}"}


def test_no_more_requests_at_a_time_than_asked_for() -> None:
    with FakeEndpoint(echo) as server:
        made = ask(server.url, *(Question(prompt=str(number)) for number in range(20)), concurrency=3)
    assert [answer.text for answer in made if isinstance(answer, Answer)] == [str(number) for number in range(20)]
    assert server.most_at_once <= 3
    assert len(server.asked) == 20


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_not_accepted(status: int) -> None:
    said = {"error": {"message": f"Incorrect API key provided: {KEY}", "type": "invalid_request_error"}}
    error = failure(lambda path, body: (status, {}, said), probe=False)
    assert error.reason == Reason.AUTHENTICATION_FAILED
    assert f"answers {status}: the key `token` of the Secret teacher is not accepted (Incorrect API key provided: ***)" in error.message


def test_a_key_that_is_missing() -> None:
    error = failure(lambda path, body: (401, {}, "no key"), key=None)
    assert error.reason == Reason.AUTHENTICATION_FAILED
    assert "set secretRef to a Secret with the key `token` (no key)" in error.message


def test_nobody_there() -> None:
    with FakeEndpoint(echo) as server:
        url = server.url
    with pytest.raises(JobError, match=r"does not answer \(ClientConnectorError.*\), 3 times") as caught:
        ask(url, probe=False)
    assert caught.value.reason == Reason.TEACHER_UNAVAILABLE


def test_no_word_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PROBE_SECONDS", 0.005)
    error = failure(echo, probe=False)
    assert error.reason == Reason.TEACHER_UNAVAILABLE
    assert "no word in time" in error.message


def test_an_error_of_the_server_is_tried_again() -> None:
    statuses = iter([500, 503, 200])

    def reply(path: str, body: dict[str, Any]) -> Any:
        status = next(statuses)
        return (status, {}, completion("yes")) if status == 200 else (status, {}, "busy")

    with FakeEndpoint(reply) as server:
        assert ask(server.url, Question(prompt="a")) == [Answer("yes")]
    assert len(server.asked) == 3


def test_an_error_of_the_server_that_stays() -> None:
    error = failure(lambda path, body: (502, {}, "bad gateway"))
    assert error.reason == Reason.TEACHER_UNAVAILABLE
    assert "answers 502 (bad gateway), 6 times" in error.message


def test_a_call_to_wait_is_obeyed_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only sleeping moves: nothing is sent within the 30 s that the server asked for."""
    now = [1000.0]
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def sleep(seconds: float) -> None:
        now[0] += seconds
        await asyncio.sleep(0)

    sent: list[float] = []

    def reply(path: str, body: dict[str, Any]) -> Any:
        sent.append(now[0])
        return (429, {"Retry-After": "30"}, "slow down") if len(sent) == 1 else echo(path, body)

    async def all_of_it(url: str) -> Sequence[Any]:
        async with ServedModel(Endpoint(url=url, model="large", concurrency=1), None, sleep) as model:
            return await answers(model, [Question(prompt="a"), Question(prompt="b")])

    with FakeEndpoint(reply) as server:
        assert asyncio.run(all_of_it(server.url)) == [Answer("A"), Answer("B")]
    assert sent[0] == 1000.0
    assert all(when >= 1030.0 for when in sent[1:])


def test_a_server_that_always_asks_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PATIENCE", 0.15)
    error = failure(lambda path, body: (429, {"Retry-After": "0"}, {"error": "quota"}))
    assert error.reason == Reason.TEACHER_UNAVAILABLE
    assert "answers 429" in error.message
    assert "(quota): lower concurrency" in error.message


def test_how_long_to_wait() -> None:
    assert seconds_in("7") == 7.0
    assert seconds_in("1e9") == endpoint.LARGEST_PAUSE
    assert seconds_in("-3") == 0.1
    assert seconds_in(None) == seconds_in("soon") == 5.0
    assert seconds_in(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<html>Welcome</html>", "something else than JSON: <html>Welcome</html>; is url the base address"),
        ({"hello": "world"}, 'did not answer as OpenAI\'s interface does: {"hello": "world"}; is url the base address'),
        ({"choices": []}, "did not answer as OpenAI's interface does"),
        ({"choices": [{"text": 7}]}, "did not answer as OpenAI's interface does"),
        (["choices"], "did not answer as OpenAI's interface does"),
    ],
)
def test_nonsense(content: Any, words: str) -> None:
    error = failure(lambda path, body: (200, {}, content), probe=False)
    assert error.reason == Reason.TEACHER_UNAVAILABLE
    assert words in error.message


def test_a_path_that_is_not_there() -> None:
    error = failure(lambda path, body: (404, {}, {"error": {"message": "The model `large` does not exist"}}), probe=True)
    assert error.reason == Reason.TEACHER_UNAVAILABLE
    assert (
        "answers 404 (The model `large` does not exist): check url, which ends before /chat/completions, and model (large)" in error.message
    )


def test_a_redirect_gets_no_key() -> None:
    with FakeEndpoint(echo) as elsewhere:
        error = failure(lambda path, body: (307, {"Location": f"{elsewhere.url}{path}"}, ""), probe=False)
    assert elsewhere.asked == []
    assert error.reason == Reason.TEACHER_UNAVAILABLE
    assert "is not followed: name that address" in error.message


def test_a_question_that_is_refused_is_told_from_the_others() -> None:
    def reply(path: str, body: dict[str, Any]) -> Any:
        if body["prompt"] == "long":
            return 400, {}, {"error": {"message": "context length exceeded"}}
        return echo(path, body)

    with FakeEndpoint(reply) as server:
        made = ask(server.url, Question(prompt="a"), Question(prompt="long"))
    assert made[0] == Answer("A")
    assert isinstance(made[1], RefusedQuestionError)
    assert str(made[1]) == "400 (context length exceeded)"


def test_a_request_that_is_refused_whatever_is_asked() -> None:
    error = failure(lambda path, body: (422, {}, {"error": {"message": "logprobs are not available"}}), probe=True)
    assert error.reason == Reason.INVALID_SPEC
    assert "refuses a request of this form: 422 (logprobs are not available)" in error.message


def test_probabilities_of_both_interfaces() -> None:
    content = [{"token": "é", "bytes": [195, 169], "logprob": -0.1, "top_logprobs": [{"token": "e", "bytes": None, "logprob": -2.5}]}]
    plain = {"tokens": ["a", " b"], "token_logprobs": [-0.1, -0.2], "top_logprobs": [{"a": -0.1, "c": -3.0}, None]}

    def reply(path: str, body: dict[str, Any]) -> Any:
        return 200, {}, completion("a b", logprobs=plain) if path == "/completions" else chat("é", "length", {"content": content})

    with FakeEndpoint(reply) as server:
        made = ask(server.url, Question(prompt="p"), Question(messages=({"role": "user", "content": "q"},)), topLogprobs=2)
    assert made == [
        Answer("a b", tokens=(Token(b"a", ((b"a", -0.1), (b"c", -3.0))), Token(b" b", ()))),
        Answer("é", cut=True, tokens=(Token("é".encode(), ((b"e", -2.5),)),)),
    ]
    bodies = {path: body for path, body, _ in server.asked}
    assert bodies["/completions"]["logprobs"] == 2
    assert (bodies["/chat/completions"]["logprobs"], bodies["/chat/completions"]["top_logprobs"]) == (True, 2)


# Into the data


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_answers_take_the_place_of_completions_of_the_training_data(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    site = Site(tmp_path, tokenizer, *PROMPTS)
    with FakeEndpoint(echo) as server:
        prepared = site.prepare(server.url)
    assert site.texts(prepared) == [("one ", "ONE <eos>"), ("two ", "TWO <eos>"), ("one ", "ONE <eos>"), ("three ", "THREE <eos>")]
    assert site.texts(prepared, "validation") == [("one ", "own<eos>")]
    assert [body["prompt"] for body in server.questions()].count("one ") == 1
    assert len(server.asked) == 4  # three questions, and the probe before them
    assert server.asked[0][1]["max_tokens"] == 1
    assert site.said == ["the teacher has answered 4 prompts (0 of them before)"]
    assert not any(KEY in path.read_text() for path in (tmp_path / "out").rglob("*.json"))


def test_the_last_turn_of_conversations_is_the_teachers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "own"), ("user", "bye")]
    site = Site(tmp_path, tokenizer, {"messages": [{"role": role, "content": content} for role, content in turns]})
    with FakeEndpoint(echo) as server:
        prepared = site.prepare(server.url)
    assert [message["content"] for message in server.questions()[0]["messages"]] == ["hi", "hello", "more"]
    ((given, learned),) = site.texts(prepared)
    assert "hello" in given
    assert learned == "MORE<|im_end|>\n"


def test_what_was_answered_is_not_asked_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first attempt breaks off in its second batch; the next one asks for what is missing; a job with more data for what is new."""
    monkeypatch.setattr("finetune_trainer.asking.BATCH", 2)
    monkeypatch.setattr("finetune_trainer.asking.PER_REQUEST", 0)
    site = Site(tmp_path, tokenizer, *PROMPTS)
    with FakeEndpoint(lambda path, body: (503, {}, "gone") if body["prompt"] == "three " else echo(path, body)) as server:
        with pytest.raises(JobError, match="answers 503"):
            site.prepare(server.url)
        server.reply = echo
        server.asked.clear()
        prepared = site.prepare(server.url)
        assert [body["prompt"] for body in server.questions()] == ["three "]
        assert "(3 of them before)" in site.said[-1]
        write_jsonl(tmp_path / "train.jsonl", *PROMPTS, {"prompt": "four ", "completion": "own"})
        server.asked.clear()
        more = site.prepare(server.url)
        assert [body["prompt"] for body in server.questions()] == ["four "]
        server.asked.clear()
        site.prepare(server.url)
        assert server.asked == []
        assert len(site.texts(more)) == len(site.texts(prepared)) + 1
        site.prepare(server.url, temperature=0.7)
        assert len(server.questions()) == 4


def test_what_the_teacher_will_not_answer_keeps_its_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def reply(path: str, body: dict[str, Any]) -> Any:
        if body["prompt"] == "two ":
            return 400, {}, {"error": "not that"}
        return 200, {}, completion("" if body["prompt"] == "three " else "yes", "length")

    site = Site(tmp_path, tokenizer, *PROMPTS, {"prompt": " ", "completion": "alone"})
    with FakeEndpoint(reply) as server:
        learned = [text for _, text in site.texts(site.prepare(server.url))]
    assert learned == ["yes<eos>", "own<eos>", "yes<eos>", "own<eos>", "alone<eos>"]
    assert site.said[-1] == (
        "the teacher has answered 2 prompts (0 of them before); 1 refused, 1 empty, 1 without a prompt: these keep their own answer; "
        "2 answers are cut off at maxTokens"
    )


def test_prompts_are_asked_as_turns_where_there_are_only_those(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    site = Site(tmp_path, tokenizer, *PROMPTS)
    with FakeEndpoint(lambda path, body: (404, {}, "no") if path == "/completions" else echo(path, body)) as server:
        learned = [text for _, text in site.texts(site.prepare(server.url))]
    assert learned[0] == "ONE <eos>"
    assert "each is asked as a user's turn" in site.said[0]


def test_texts_have_no_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    site = Site(tmp_path, tokenizer, {"text": "once upon a time"})
    with FakeEndpoint(echo) as server, pytest.raises(JobError, match="answers prompts, which rows of the form text do not have") as caught:
        site.prepare(server.url)
    assert caught.value.reason == Reason.INVALID_SPEC
    assert server.asked == []


def tops(text: str, chance: float, other: str) -> dict[str, Any]:
    """Each character of a text with its chance, and another one's, in the form of completions."""
    values = [{character: float(np.log(chance)), other: float(np.log(0.8 - chance))} for character in text]
    return {"tokens": list(text), "token_logprobs": [0.0] * len(text), "top_logprobs": values}


def test_probabilities_become_targets_where_the_tokens_are_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The student's tokens are bytes: an answer by characters fits, one by pairs of characters does not."""

    def reply(path: str, body: dict[str, Any]) -> Any:
        if body["prompt"] == "two ":
            return 200, {}, completion("ab", logprobs={"tokens": ["ab"], "top_logprobs": [{"ab": 0.0}]})
        return 200, {}, completion("cat", logprobs=tops("cat", 0.6, "z"))

    site = Site(tmp_path, tokenizer, *PROMPTS[:2])
    with FakeEndpoint(reply) as server:
        prepared = site.prepare(server.url, topLogprobs=3)
    assert "1 examples have its probabilities as targets, 1 its text alone" in site.said[-1]
    kept = TeacherCache(site.storage.at(f"{site.entry.name}/{BESIDE_DATA}"), prepared.train)
    vocabulary = tokenizer.get_vocab()

    soft = kept.of((0,), device=CPU)
    chances = soft.log_probabilities.exp().numpy()
    assert soft.ids[:3, 0].tolist() == [vocabulary[character] for character in "cat"]
    assert soft.ids[:3, 1].tolist() == [vocabulary["z"]] * 3
    np.testing.assert_allclose(chances[:3], [[0.6, 0.2, 0.0, 0.2]] * 3, atol=1e-3)
    assert soft.ids[3, 0].item() == vocabulary["<eos>"]
    np.testing.assert_allclose(chances[3], [1, 0, 0, 0], atol=1e-6)

    hard = kept.of((1,), device=CPU)
    assert hard.ids[:, 0].tolist() == [vocabulary["a"], vocabulary["b"], vocabulary["<eos>"]]
    np.testing.assert_allclose(hard.log_probabilities.exp().numpy(), [[1, 0, 0, 0]] * 3, atol=1e-6)


def test_a_secret_without_a_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    site = Site(tmp_path, tokenizer, *PROMPTS)
    (tmp_path / "secrets" / "teacher" / "token").unlink()
    with pytest.raises(JobError) as caught:
        site.prepare("http://127.0.0.1:1/v1")
    assert caught.value.reason == Reason.SECRET_NOT_FOUND
