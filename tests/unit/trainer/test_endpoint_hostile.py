"""A served teacher that is broken, or means no good: nothing that it says ends the process, fills its memory or spoils the data."""

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import tenacity
from endpoint_site import KEY, PROMPTS, Site
from fake_endpoint import FakeEndpoint, chat, completion, echo
from test_endpoint import ask, failure
from tiny_models import byte_tokenizer

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Endpoint
from finetune_trainer import endpoint
from finetune_trainer.completions import Answer, Question, Token
from finetune_trainer.endpoint import ServedModel, answers, seconds_in
from finetune_trainer.errors import JobError
from finetune_trainer.objectives.distillation.soft_targets import _where


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRY_WAIT", tenacity.wait_none())


def answered(content: Any, *, chats: bool = False, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    """What is made of one server's answer."""
    question = Question(messages=({"role": "user", "content": "q"},)) if chats else Question(prompt="p")
    with FakeEndpoint(lambda path, body: (200, headers or {}, content)) as server:
        (made,) = ask(server.url, question, **fields)
    assert isinstance(made, Answer)
    return made


@pytest.mark.parametrize("key", ["EMPTY", "a", "text", '"'])
def test_a_key_that_is_a_word_leaves_the_answers_as_they_are(key: str) -> None:
    """Servers without a key of their own are given any: EMPTY, token, none."""
    assert answered(completion("EMPTY is a text"), key=key) == Answer("EMPTY is a text")


def test_a_key_that_is_repeated_in_a_redirect_or_an_answer_is_not_shown() -> None:
    assert "see?key=***" in failure(lambda path, body: (302, {"Location": f"http://elsewhere/see?key={KEY}"}, "")).message
    assert "***" in failure(lambda path, body: (200, {}, {"you sent": KEY})).message
    assert "***" in failure(lambda path, body: (200, {}, f"<p>{KEY}</p>")).message


@pytest.mark.parametrize("key", ["one\nX-Other: header", "one\x00", "schlüssel"])
def test_a_key_that_cannot_be_sent(key: str) -> None:
    with FakeEndpoint(echo) as server, pytest.raises(JobError, match="the key `token` of the Secret teacher holds a line break") as caught:
        ask(server.url, Question(prompt="p"), key=key)
    assert caught.value.reason == Reason.AUTHENTICATION_FAILED
    assert key not in caught.value.message
    assert server.asked == []


def test_an_answer_longer_than_any_could_be_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "ANSWER_BYTES", 1000)
    assert answered(completion("a" * 1000), maxTokens=1 << 10) == Answer("a" * 1000)
    error = failure(lambda path, body: (200, {}, completion("a" * 3000)), maxTokens=1)
    assert error.reason == Reason.TEACHER_UNAVAILABLE
    assert "answers with more than 1,256 bytes, which maxTokens (1) cannot need" in error.message


def test_of_a_long_error_the_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "ERROR_BYTES", 1000)
    error = failure(lambda path, body: (401, {}, "no! " * 100_000))
    assert error.reason == Reason.AUTHENTICATION_FAILED
    assert len(error.message) < 1000


def test_what_is_packed_is_not_unpacked() -> None:
    """64 MiB come in 64 KiB."""
    packed = gzip.compress(json.dumps(completion("a" * (64 << 20))).encode())
    error = failure(lambda path, body: (200, {"Content-Encoding": "gzip"}, packed))
    assert error.reason == Reason.TEACHER_UNAVAILABLE
    assert "something else than JSON" in error.message


@pytest.mark.parametrize("charset", ["zip", "idna", "utf-16", "nothing"])
def test_json_is_utf_8_whatever_the_server_calls_it(charset: str) -> None:
    content = json.dumps(completion("é"), ensure_ascii=False).encode()
    assert answered(content, headers={"Content-Type": f"application/json; charset={charset}"}) == Answer("é")


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_json_that_is_nested_too_deeply(status: int) -> None:
    deep = "[" * 50_000
    error = failure(lambda path, body: (status, {}, deep), probe=True)
    reasons = {400: Reason.INVALID_SPEC, 401: Reason.AUTHENTICATION_FAILED}
    assert error.reason == reasons.get(status, Reason.TEACHER_UNAVAILABLE)


@pytest.mark.parametrize(
    "logprobs",
    [
        "none",
        ["a"],
        {"content": ["a"]},
        {"content": [{"token": "a", "top_logprobs": {"a": 0}}]},
        {"content": [{"token": "a", "bytes": 10**12}]},
        {"content": [{"token": "a", "bytes": [300]}]},
        {"tokens": ["a"], "top_logprobs": [["a"]]},
        {"tokens": [7], "top_logprobs": [None]},
        {"tokens": ["a"], "top_logprobs": [{"a": "much"}]},
        {"tokens": ["a"], "top_logprobs": [{"a": 10**400}]},
    ],
)
def test_probabilities_that_are_none(logprobs: Any) -> None:
    error = failure(lambda path, body: (200, {}, completion("a", logprobs=logprobs)), topLogprobs=2)
    assert error.reason == Reason.TEACHER_UNAVAILABLE
    assert "did not answer as OpenAI's interface does" in error.message
    assert answered(completion("a", logprobs=logprobs)) == Answer("a")  # where nobody asked for them


def test_probabilities_that_are_no_numbers_are_left_out() -> None:
    plain = {"tokens": ["a"], "top_logprobs": [{"a": -0.5, "b": float("nan"), "c": float("-inf"), "d": None, "e": float("inf")}]}
    assert answered(completion("a", logprobs=plain), topLogprobs=5).tokens == (Token(b"a", ((b"a", -0.5),)),)
    top = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": float("nan")}]
    talk = chat("a", logprobs={"content": [{"token": "a", "bytes": None, "logprob": -0.5, "top_logprobs": top}]})
    assert answered(talk, chats=True, topLogprobs=2).tokens == (Token(b"a", ((b"a", -0.5),)),)


def test_half_a_character_is_replaced() -> None:
    """A server that cuts an escape of two in the middle; the sign for it is U+FFFD."""
    assert answered('{"choices": [{"text": "so \\ud83d"}]}') == Answer("so \ufffd")
    assert answered('{"choices": [{"text": "\\ude00 so \\ud83d\\ude00"}]}') == Answer("\ufffd so \U0001f600")
    logprobs = '"logprobs": {"tokens": ["\\ud83d"], "top_logprobs": [{"\\ud83d": -1}]}'
    made = answered('{"choices": [{"text": "a", ' + logprobs + "}]}", topLogprobs=1)
    assert made.tokens == (Token("\ufffd".encode(), (("\ufffd".encode(), -1.0),)),)


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_half_a_character_in_a_servers_words_can_be_told(status: int) -> None:
    """A report that holds it can be written neither to the log nor as the termination message."""
    error = failure(lambda path, body: (status, {}, '{"error": {"message": "no \\ud83d!"}}'), probe=True)
    assert "no \ufffd!" in error.message
    assert error.message.encode()


@pytest.mark.parametrize("asked", ["nan", "-nan", "Mon, 01 Jan 0001 00:00:00", "Fri, 31 Dec 9999 23:59:59 -2359", "\x00", "٣"])
def test_a_pause_that_makes_no_sense_is_still_a_pause(asked: str) -> None:
    assert 0.1 <= seconds_in(asked) <= endpoint.LARGEST_PAUSE


def test_a_port_that_is_none() -> None:
    with pytest.raises(JobError, match=r"teacher\.endpoint\.url: ") as caught:
        ask("http://127.0.0.1:99999/v1", probe=False)
    assert caught.value.reason == Reason.INVALID_SPEC


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("169.254.169.254", "url leads to 169.254.169.254, a link-local address, where no model is served"),
        ("0xa9fea9fe", "url leads to 169.254.169.254, a link-local address, where no model is served"),
        ("2852039166", "url: 2852039166 - is not a canonical IPv4 address"),
        ("0251.0376.0251.0376", "url: 0251.0376.0251.0376 - is not a canonical IPv4 address"),
    ],
)
def test_a_clouds_metadata_is_not_asked(host: str, words: str) -> None:
    """However its number is written: the system reads all of these as the same address."""
    with pytest.raises(JobError) as caught:
        ask(f"http://{host}/v1", probe=True)
    assert caught.value.reason == Reason.INVALID_SPEC
    assert f"teacher.endpoint.{words}" in caught.value.message


@pytest.mark.parametrize(
    "address",
    [
        "fe80::1%eth0",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "fd00:ec2::254",
        "100.100.100.200",
        "168.63.129.16",
    ],
)
def test_a_clouds_metadata_is_not_asked_wherever_it_is(address: str) -> None:
    """A name may lead to any of these."""
    with pytest.raises(JobError, match="where no model is served") as caught:
        endpoint._check_host(address, "judge.endpoint")
    assert caught.value.reason == Reason.INVALID_SPEC


@pytest.mark.parametrize("address", ["10.0.0.1", "127.0.0.1", "fd00::1", "64:ff9b::a00:1", "2001:db8::1", "models.example.com"])
def test_addresses_of_a_cluster_are_asked(address: str) -> None:
    endpoint._check_host(address, "judge.endpoint")


def test_odd_answers_reach_the_data(tmp_path: Path) -> None:
    """From the server to the tokens, and to what is kept for the next job."""
    nan = {"tokens": list("so?"), "top_logprobs": [{"s": float("nan")}] * 3}
    content = json.dumps(completion("so?", logprobs=nan)).replace("so?", "so\\ud83d")
    site = Site(tmp_path, byte_tokenizer(), {"prompt": "one ", "completion": "own"})
    with FakeEndpoint(lambda path, body: (200, {}, content)) as server:
        learned = [text for _, text in site.texts(site.prepare(server.url, topLogprobs=2))]
    assert learned == ["so\ufffd<eos>"]


def test_a_pause_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, though several requests were told to wait: whoever looks at the log sees why nothing moves."""
    said: list[str] = []
    busy = iter(range(3))

    def reply(path: str, body: dict[str, Any]) -> Any:
        return echo(path, body) if next(busy, None) is None else (429, {"Retry-After": "60"}, "quota")

    async def sleep(seconds: float) -> None:
        model._free_at = 0.0
        await asyncio.sleep(0)

    async def all_of_it() -> None:
        async with model:
            await answers(model, [Question(prompt="a"), Question(prompt="b"), Question(prompt="c")])

    with FakeEndpoint(reply) as server:
        model = ServedModel(Endpoint(url=server.url, model="large"), None, sleep, said.append)
        asyncio.run(all_of_it())
    assert said == ["the teacher has too many requests (429) and asks to wait 60 s (quota)"]


def test_a_teacher_that_answers_nothing(tmp_path: Path) -> None:
    """It may answer another time, so an empty answer is asked again by the next attempt."""
    said, site = "", Site(tmp_path, byte_tokenizer(), *PROMPTS[1:])

    def reply(path: str, body: dict[str, Any]) -> Any:
        return (400, {}, {"error": "not that"}) if body["prompt"] == "two " else (200, {}, completion(said))

    with FakeEndpoint(reply) as server:
        with pytest.raises(JobError) as caught:
            site.prepare(server.url)
        said = "yes"
        assert [text for _, text in site.texts(site.prepare(server.url))] == ["own<eos>", "yes<eos>", "yes<eos>"]
    assert caught.value.reason == Reason.TEACHER_UNAVAILABLE
    assert caught.value.message.endswith(
        ": large has answered none of 3 prompts: 1 refused, the first with 400 (not that), "
        "2 empty; check model, and maxTokens where it reasons first"
    )


@pytest.mark.parametrize(
    ("prompt", "words"),
    [(" ", "none of 2 examples has a prompt for the teacher to answer"), (3, "prompt")],
    ids=["blank", "no text"],
)
def test_data_without_a_prompt_is_not_the_teachers_fault(tmp_path: Path, prompt: Any, words: str) -> None:
    site = Site(tmp_path, byte_tokenizer(), *[{"prompt": prompt, "completion": "own"}] * 2)
    with FakeEndpoint(echo) as server, pytest.raises(JobError, match=words) as caught:
        site.prepare(server.url)
    assert caught.value.reason == Reason.DATASET_INVALID
    assert server.asked == []


class Counted(bytes):
    """Counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return bytes.__eq__(self, other)

    __hash__ = bytes.__hash__


def test_an_answer_that_is_cut_otherwise_costs_no_more_than_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher with another tokenizer: nearly every answer is one, and it may have 65,536 tokens."""
    monkeypatch.setattr(Counted, "compared", 0)
    texts = [Counted(b"%d" % number) for number in range(3000)]
    assert _where(texts, [Counted(b"other"), *texts]) is None
    assert Counted.compared <= 3000


@pytest.mark.parametrize(
    ("texts", "wanted", "expected"),
    [
        ("abc", "abc", (0, 3)),
        ("xabc.", "abc", (1, 3)),
        ("xyabc.", "abc", (2, 3)),
        ("ab", "abc", (0, 2)),  # cut off at maxSequenceLength
        ("xab", "abc", (1, 2)),
        ("xyab", "abc", None),  # too little of it, too late, to be sure
        ("abxabc", "abc", (3, 3)),
        ("abd", "abc", None),
        ("", "abc", None),
        ("abc", "", None),
    ],
)
def test_where_the_students_tokens_are_the_teachers(texts: str, wanted: str, expected: tuple[int, int] | None) -> None:
    assert _where([each.encode() for each in texts], [each.encode() for each in wanted]) == expected
