"""Questions to a served model, and its answers kept: what is paid for once is not paid for again.

    .finetune/cache/answers/<key>/<batch>.json    answers by the digest of their question, in output.storage, of each batch that is done

So a retry, and another job with the same endpoint, does not pay again; they go where no job has begun with them for long. The key covers
all that an answer follows from, but for the model behind the name: also the job's namespace, since a short host name is another server in
another one. What is known is held in a file of this machine, not in memory.
"""

import asyncio
import base64
import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.v1alpha1 import Endpoint
from finetune_trainer.completions import Answer, Question, Token
from finetune_trainer.data.shelf import Shelf
from finetune_trainer.endpoint import MissingRouteError, Party, RefusedQuestionError, ServedModel, answers
from finetune_trainer.errors import JobError
from finetune_trainer.kept_answers import keep, read_kept
from finetune_trainer.manifest import digest_of
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage

FOLDER = ".finetune/cache/answers"
FORMAT = 2
BATCH = 128
"""Questions whose answers are written together, or so many for each request at a time as PER_REQUEST says."""
PER_REQUEST = 16
BATCH_TOKENS = 1 << 20
"""Tokens whose probabilities the answers of a batch may tell at most, unless those that are asked for at a time may have more."""
SAY_SECONDS = 15.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Served:
    """An endpoint with its key, and who is behind it."""

    endpoint: Endpoint
    key: str | None
    party: Party


def served(endpoint: Endpoint, party: Party, mounts: Mounts) -> Served:
    """An endpoint with the key of its Secret. Raises JobError (SecretNotFound)."""
    try:
        key = mounts.secret(endpoint.secret_ref.name, "token") if endpoint.secret_ref else None
    except JobError as error:
        raise JobError(error.reason, f"{party.field}.secretRef: {error.message}") from error
    return Served(endpoint, key, party)


def identity_of(endpoint: Endpoint, namespace: str) -> dict[str, Any]:
    """What an answer follows from, but for its question."""
    return {**endpoint.model_dump(mode="json", by_alias=True, exclude={"secret_ref", "concurrency"}), "namespace": namespace}


def folder_of(identity: Mapping[str, Any]) -> str:
    """The folder in output.storage where answers are kept."""
    return f"{FOLDER}/{digest_of({'format': FORMAT, **identity})[7:39]}"


@dataclass
class Count:
    """What became of the questions."""

    asked: int = 0
    known: int = 0
    refused: int = 0
    first_refusal: str = ""
    empty: int = 0
    cut: int = 0


def batch_size(endpoint: Endpoint) -> int:
    """Questions that are asked together. Probabilities, which are in memory until their batch is done, are a hundred times their text."""
    size = max(BATCH, PER_REQUEST * endpoint.concurrency)
    if not endpoint.top_logprobs:
        return size
    return max(endpoint.concurrency, min(size, BATCH_TOKENS // (endpoint.max_tokens * (1 + endpoint.top_logprobs))))


class Asker:
    """Answers from the storage, else from the endpoint. A context."""

    def __init__(self, served: Served, storage: Storage, count: Count, say: Say) -> None:
        self._model = ServedModel(served.endpoint, served.key, tell=say, party=served.party)
        self._served, self._storage, self._count, self._say = served, storage, count, say
        self._runner = asyncio.Runner()
        self._shelf = Shelf()
        self._is_read = False
        self._probed: set[bool] = set()
        self._prompts_as_chat = False
        self._heard = 0
        self._said = self._begun = time.monotonic()

    def __enter__(self) -> "Asker":
        self._runner.run(self._model.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._runner.run(self._model.__aexit__(*error))
        finally:
            self._runner.close()
            self._shelf.__exit__(*error)

    def answers(self, questions: Sequence[Question]) -> list[Answer | None]:
        """The answer to each; None where there is none, being refused or empty. Raises JobError as ServedModel does."""
        return [each if isinstance(each, Answer) and each.text.strip() else None for each in self.outcomes(questions)]

    def outcomes(self, questions: Sequence[Question]) -> list[Answer | None]:
        """The answer to each, which may be empty; None where it is refused. Raises JobError as ServedModel does."""
        if not self._is_read:
            for name, value in read_kept(self._storage):
                self._shelf.put(name.encode(), json.dumps(value).encode())
            self._is_read = True
        names = [_digest(question) for question in questions]
        known = {name: answer for name in names if (answer := _from_bytes(self._shelf.get(name.encode()))) is not None}
        new = {name: question for name, question in zip(names, questions, strict=True) if name not in known}
        self._count.known += sum(name not in new for name in names)
        self._count.asked += sum(name in new for name in names)
        refusals: dict[str, str] = {}
        if new:
            self._ask(new, known, refusals)
        return [self._counted(known.get(name), refusals.get(name, "")) for name in names]

    def _ask(self, new: Mapping[str, Question], known: dict[str, Answer], refusals: dict[str, str]) -> None:
        """Add what comes of new questions. What has come is kept even where an error, or a call to stop, ends the rest: it is paid for.

        An empty answer is not kept beyond this attempt: the server may have been at fault, and another time it may say something.
        """
        names = list(new)

        def hear(place: int, answer: Answer | RefusedQuestionError) -> None:
            if isinstance(answer, Answer):
                known[names[place]] = answer
            else:
                refusals[names[place]] = str(answer)
            self._tell_rate()

        try:
            self._send(list(new.values()), hear)
        finally:
            done = {name: _as_json(known[name]) for name in names if name in known}
            for name, value in done.items():
                self._shelf.put(name.encode(), json.dumps(value).encode())
            keep(self._storage, {name: value for name, value in done.items() if value["text"].strip()})

    def _counted(self, answer: Answer | None, refusal: str) -> Answer | None:
        if answer is None:
            self._count.refused += 1
            self._count.first_refusal = self._count.first_refusal or refusal
            return None
        if answer.text.strip():
            self._count.cut += answer.cut
        else:
            self._count.empty += 1
        return answer

    def _send(self, questions: Sequence[Question], hear: Callable[[int, Answer | RefusedQuestionError], None]) -> None:
        for chat in sorted({question.prompt is None for question in questions}):
            self.probe(chat=chat)
        if self._prompts_as_chat:
            questions = [
                replace(each, prompt=None, messages=({"role": "user", "content": each.prompt},)) if each.prompt else each
                for each in questions
            ]
        self._runner.run(answers(self._model, questions, hear))

    def _tell_rate(self) -> None:
        self._heard += 1
        if time.monotonic() - self._said > SAY_SECONDS:
            self._said = time.monotonic()
            rate = self._heard / max(1e-9, self._said - self._begun)
            self._say(f"{self._served.party.who} has answered {self._heard:,} prompts, {rate:.1f} a second")

    def probe(self, *, chat: bool) -> None:
        """Find out, once, whether the endpoint can be asked in this form, before anything is paid for. Raises JobError."""
        if chat in self._probed:
            return
        self._probed.add(chat)
        try:
            self._runner.run(self._model.probe(chat=chat))
        except MissingRouteError:
            if chat:
                raise
            self._runner.run(self._model.probe(chat=True))
            self._prompts_as_chat = True
            self._say("the endpoint takes no plain prompts (/completions): each is asked as a user's turn")


def _digest(question: Question) -> str:
    asked = {"prompt": question.prompt, "messages": list(question.messages), "tools": list(question.tools)}
    return digest_of(asked)[7:39]


def _as_json(answer: Answer) -> dict[str, Any]:
    """The tokens, which are a hundred times the text, packed: as JSON, with bytes as the characters of the same number."""
    tokens = [[token.text.decode("latin-1"), [[text.decode("latin-1"), value] for text, value in token.top]] for token in answer.tokens]
    packed = base64.b64encode(zlib.compress(json.dumps(tokens).encode())).decode() if tokens else ""
    return {"text": answer.text, "cut": answer.cut, "tokens": packed}


def _from_bytes(content: bytes | None) -> Answer | None:
    """The answer of an _as_json; None where it is none."""
    try:
        value = json.loads(content or b"")
        packed = value["tokens"]
        named = json.loads(zlib.decompress(base64.b64decode(packed))) if packed else ()
        tokens = (Token(text.encode("latin-1"), tuple((each.encode("latin-1"), float(p)) for each, p in top)) for text, top in named)
        answer = Answer(value["text"], bool(value["cut"]), tuple(tokens))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, zlib.error):
        return None
    return answer if isinstance(answer.text, str) else None
