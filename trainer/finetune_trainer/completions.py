"""What is asked of a served model and what it answers, in the JSON of OpenAI's interface. Pure; nothing in an answer is taken on trust."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.v1alpha1 import Endpoint

Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Question:
    """What to ask: a plain prompt, or a conversation that ends before the answer."""

    prompt: str | None = None
    messages: Messages = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    place: str = field(default="", compare=False)
    """The row that it is of, for a message."""


@dataclass(frozen=True)
class Token:
    """A token of an answer, as bytes, with the most probable ones in its place."""

    text: bytes
    top: tuple[tuple[bytes, float], ...]
    """Tokens with the logarithm of their probability."""


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    text: str
    cut: bool = False
    """Whether it was cut off at maxTokens."""
    tokens: tuple[Token, ...] = ()
    """Empty where no probabilities were asked for, or none were given."""


def request_of(question: Question, endpoint: Endpoint, most_tokens: int) -> tuple[str, dict[str, Any]]:
    """Path below the base address, and body."""
    body: dict[str, Any] = {"model": endpoint.model, "max_tokens": most_tokens, "temperature": endpoint.temperature, "stream": False}
    if question.prompt is not None:
        return "/completions", body | {"prompt": question.prompt} | ({"logprobs": endpoint.top_logprobs} if endpoint.top_logprobs else {})
    body |= {"messages": list(question.messages)} | ({"tools": list(question.tools)} if question.tools else {})
    return "/chat/completions", body | ({"logprobs": True, "top_logprobs": endpoint.top_logprobs} if endpoint.top_logprobs else {})


def answer_in(payload: Any, *, probabilities: bool) -> Answer:  # noqa: ANN401 - any JSON
    """The answer in a server's JSON. Raises LookupError, TypeError, ValueError, AttributeError or OverflowError where there is none."""
    choice = payload["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    text = "" if text is None else text
    if not isinstance(text, str):
        raise TypeError("the text is no string")
    tokens = _tokens(choice.get("logprobs") or {}) if probabilities else ()
    return Answer(_whole(text), cut=choice.get("finish_reason") == "length", tokens=tokens)


def _whole(text: str) -> str:
    """The text with a sign in place of half a character, as an escape that was cut in two leaves it: no tokenizer takes that."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _tokens(found: Mapping[str, Any]) -> tuple[Token, ...]:
    """The tokens with their probabilities, in the form of chat completions (`content`) or of completions (`tokens`)."""
    if found.get("content"):
        return tuple(
            Token(_bytes(each), _numbers((_bytes(other), other["logprob"]) for other in each.get("top_logprobs") or ()))
            for each in found["content"]
        )
    tokens, tops = found.get("tokens") or (), found.get("top_logprobs") or ()
    return tuple(
        Token(_whole(token).encode(), _numbers((_whole(other).encode(), value) for other, value in (top or {}).items()))
        for token, top in zip(tokens, tops, strict=False)
    )


def _numbers(top: Iterable[tuple[bytes, Any]]) -> tuple[tuple[bytes, float], ...]:
    """Those whose logarithm is a number: some servers write null, NaN or -Infinity for a token that cannot be.

    More digits than five would be kept for nothing: the targets are float16.
    """
    return tuple((text, round(float(value), 5)) for text, value in top if value is not None and math.isfinite(float(value)))


def _bytes(token: Mapping[str, Any]) -> bytes:
    """A token's bytes; its text may be no whole character."""
    given = token.get("bytes")
    return bytes(list(given)) if given is not None else _whole(str(token["token"])).encode()
