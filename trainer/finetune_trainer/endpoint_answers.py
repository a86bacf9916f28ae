"""A teacher behind an endpoint: its answers take the place of the training data's own while the data is prepared.

    .finetune/cache/answers/<key>/<batch>.json    answers by the digest of their question, in output.storage, of each batch that is done

So a retry, and another job with the same endpoint, does not pay again; they go where no job has begun with them for long. The key covers
all that an answer follows from, but for the model behind the name: also the job's namespace, since a short host name is another server in
another one. What is known is held in a file of this machine, not in memory. With topLogprobs the probabilities become targets (see
objectives/distillation/soft_targets.py), which are written beside the prepared data.
"""

import asyncio
import base64
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Endpoint, FineTuneJob
from finetune_trainer.data.encoding import Encoded, Encoder
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.formats import Conversation, Example, PromptCompletion
from finetune_trainer.data.rows import Fault
from finetune_trainer.data.shelf import Shelf
from finetune_trainer.data_cache import mark_used
from finetune_trainer.endpoint import FIELD, Answer, MissingRouteError, Question, RefusedQuestionError, ServedModel, Token, answers
from finetune_trainer.errors import JobError
from finetune_trainer.manifest import digest_of
from finetune_trainer.objectives.distillation import teacher_cache
from finetune_trainer.objectives.distillation.soft_targets import VocabularyBytes, hard_targets, soft_targets
from finetune_trainer.objectives.distillation.teacher_cache import Kept
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage, storage_errors
from finetune_trainer.teacher import BESIDE_DATA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = ".finetune/cache/answers"
FORMAT = 2
BATCH = 128
"""Questions whose answers are written together, or so many for each request at a time as PER_REQUEST says."""
PER_REQUEST = 16
BATCH_TOKENS = 1 << 20
"""Tokens whose probabilities the answers of a batch may tell at most, unless those that are asked for at a time may have more."""
SAY_SECONDS = 15.0

Say = Callable[[str], None]


def endpoint_of(job: FineTuneJob) -> Endpoint | None:
    """The endpoint of a job whose teacher is served."""
    spec = job.spec.objective.distillation
    return spec.teacher.endpoint if spec is not None else None


@dataclass
class _Count:
    """What became of the questions."""

    asked: int = 0
    known: int = 0
    refused: int = 0
    first_refusal: str = ""
    empty: int = 0
    cut: int = 0
    unasked: int = 0
    """Examples without a prompt."""
    soft: int = 0
    hard: int = 0


@dataclass
class EndpointTeacher:
    """What `data.prepare` hands its training examples through."""

    endpoint: Endpoint
    namespace: str
    """The job's."""
    key: str | None
    storage: Storage
    """output.storage."""
    tokenizer: "PreTrainedTokenizerBase"
    encoder: Encoder
    say: Say
    count: _Count = field(default_factory=_Count)
    _soft: Shelf = field(default_factory=Shelf)
    """Targets by the tokens that they are of."""

    def identity(self) -> dict[str, Any]:
        """What the prepared data follows from."""
        settings = self.endpoint.model_dump(mode="json", by_alias=True, exclude={"secret_ref", "concurrency"})
        return {**settings, "namespace": self.namespace}

    def taught(self, examples: Iterable[Example | Fault]) -> Iterator[Example | Fault]:
        """The examples with the teacher's answers.

        Raises JobError (TeacherUnavailable, AuthenticationFailed, InvalidSpec, StorageFull, StorageUnavailable).
        """
        size = batch_size(self.endpoint)
        source = iter(examples)
        folder = f"{FOLDER}/{digest_of(self._follows())[7:39]}"
        mark_used(self.storage, folder)
        with _Asker(self.endpoint, self.key, self.storage.at(folder), self.count, self.say) as asker:
            while batch := list(islice(source, size)):
                questions = {place: asked for place, item in enumerate(batch) if (asked := question_of(item)) is not None}
                self.count.unasked += sum(not isinstance(item, Fault) for item in batch) - len(questions)
                found = asker.answers(list(questions.values()))
                taught = list(batch)
                for place, answer in zip(questions, found, strict=True):
                    if answer is not None:
                        taught[place] = with_answer(batch[place], answer)
                if self.endpoint.top_logprobs:
                    self._keep_soft(taught, {place: answer for place, answer in zip(questions, found, strict=True) if answer is not None})
                yield from taught
        self._tell()

    def write(self, folder: Path, train: Examples) -> None:
        """Leave the targets beside prepared data, where there are any."""
        if not self.endpoint.top_logprobs:
            return
        beside = Storage(LocalFileSystem(), str(folder / BESIDE_DATA), f"file://{folder / BESIDE_DATA}")
        shards = teacher_cache.shards_of(train)
        for number, (start, end) in enumerate(shards):
            parts = [self._kept(*train.example(index)) for index in range(start, end)]
            ids, kept = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "log_probabilities"))
            teacher_cache.write_shard(beside, number, Kept(ids, kept))
        teacher_cache.write_complete(beside, shards)

    def _follows(self) -> dict[str, Any]:
        return {"format": FORMAT, **self.identity()}

    def _keep_soft(self, taught: Sequence[Example | Fault], found: Mapping[int, Answer]) -> None:
        """Remember the targets of a batch, by the student's tokens."""
        chosen = [taught[place] for place in found]
        for item, answer in zip(self.encoder.encode(chosen), found.values(), strict=True):
            made = None
            if isinstance(item, Encoded):
                made = soft_targets(
                    item, [(token.text, token.top) for token in answer.tokens], self._vocabulary, self.endpoint.top_logprobs
                )
            self.count.soft += made is not None
            self.count.hard += made is None
            if made is not None and isinstance(item, Encoded):
                self._soft.put(_name_of(item.tokens), made.ids.tobytes() + made.log_probabilities.tobytes())

    @cached_property
    def _vocabulary(self) -> VocabularyBytes:
        return VocabularyBytes.of_tokenizer(self.tokenizer)

    def _kept(self, tokens: Any, labelled: Any) -> Kept:  # noqa: ANN401 - arrays
        """The targets at an example's labels."""
        soft, k = self._soft.get(_name_of(tokens)), self.endpoint.top_logprobs
        if soft is None:
            return hard_targets(tokens[1:][labelled[1:]], k)
        count = len(soft) // (4 * k + 2 * (k + 1))
        ids = np.frombuffer(soft, np.int32, count * k).reshape(count, k)
        return Kept(ids, np.frombuffer(soft, np.float16, offset=ids.nbytes).reshape(count, k + 1))

    def _tell(self) -> None:
        """Say what became of the questions. Raises JobError where the teacher has answered none."""
        count = self.count
        questions = count.asked + count.known
        if not questions and not count.unasked:
            return  # not one row is an example, which is told of the data
        if not questions:
            raise JobError(Reason.DATASET_INVALID, f"data.train: none of {count.unasked:,} examples has a prompt for the teacher to answer")
        answered = questions - count.refused - count.empty
        if not answered:
            why = [f"{count.refused:,} refused, the first with {count.first_refusal}"] if count.refused else []
            why += [f"{count.empty:,} empty; check model, and maxTokens where it reasons first"] if count.empty else []
            what = f"{self.endpoint.model} has answered none of {questions:,} prompts: {', '.join(why)}"
            raise JobError(Reason.TEACHER_UNAVAILABLE, f"{FIELD}: {what}")
        kept = [(count.refused, "refused"), (count.empty, "empty"), (count.unasked, "without a prompt")]
        own = [f"{number:,} {what}" for number, what in kept if number]
        parts = [f"the teacher has answered {answered:,} prompts ({count.known:,} of them before)"]
        parts += [f"{', '.join(own)}: these keep their own answer"] if own else []
        parts += [f"{count.cut:,} answers are cut off at maxTokens"] if count.cut else []
        if self.endpoint.top_logprobs:
            parts.append(f"{count.soft:,} examples have its probabilities as targets, {count.hard:,} its text alone, being cut otherwise")
        self.say("; ".join(parts))


def endpoint_teacher(
    job: FineTuneJob, tokenizer: "PreTrainedTokenizerBase", mounts: Mounts, storage: Storage, say: Say
) -> EndpointTeacher | None:
    """The teacher of a job whose teacher is served, else None. Raises JobError (SecretNotFound, InvalidSpec)."""
    endpoint, spec = endpoint_of(job), job.spec.objective.distillation
    if endpoint is None or spec is None:
        return None
    key = mounts.secret(endpoint.secret_ref.name, "token") if endpoint.secret_ref else None
    encoder = Encoder(tokenizer, spec.loss_on, job.spec.training.max_sequence_length)
    return EndpointTeacher(endpoint, job.metadata.namespace, key, storage, tokenizer, encoder, say)


def batch_size(endpoint: Endpoint) -> int:
    """Questions that are asked together. Probabilities, which are in memory until their batch is done, are a hundred times their text."""
    size = max(BATCH, PER_REQUEST * endpoint.concurrency)
    if not endpoint.top_logprobs:
        return size
    return max(endpoint.concurrency, min(size, BATCH_TOKENS // (endpoint.max_tokens * (1 + endpoint.top_logprobs))))


def _name_of(tokens: Any) -> bytes:  # noqa: ANN401 - an array
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).digest()


def question_of(example: Example | Fault) -> Question | None:
    """What to ask for an example: all before its last answer; None where nothing is before it. Raises JobError for rows without prompts."""
    if isinstance(example, Fault):
        return None
    if isinstance(example, PromptCompletion):
        return Question(prompt=example.prompt, place=str(example.place)) if example.prompt.strip() else None
    if isinstance(example, Conversation):
        last = _last_answer(example)
        return Question(messages=example.messages[:last], tools=example.tools, place=str(example.place)) if last else None
    raise JobError(
        Reason.INVALID_SPEC,
        "data.format: an endpoint answers prompts, which rows of the form text do not have; "
        "use promptCompletion or messages, or name a teacher.source",
    )


def with_answer(example: Example | Fault, answer: Answer) -> Example | Fault:
    """The example with another answer."""
    if isinstance(example, PromptCompletion):
        return replace(example, completion=answer.text)
    assert isinstance(example, Conversation)  # noqa: S101 - only these are asked for
    return replace(example, messages=(*example.messages[: _last_answer(example)], {"role": "assistant", "content": answer.text}))


def _last_answer(example: Conversation) -> int:
    """Place of the last assistant turn; every conversation has one."""
    return max(index for index, message in enumerate(example.messages) if message["role"] == "assistant")


class _Asker:
    """Answers from the storage, else from the endpoint. A context."""

    def __init__(self, endpoint: Endpoint, key: str | None, storage: Storage, count: _Count, say: Say) -> None:
        self._model, self._storage, self._count, self._say = ServedModel(endpoint, key, tell=say), storage, count, say
        self._runner = asyncio.Runner()
        self._shelf = Shelf()
        self._is_read = False
        self._probed: set[bool] = set()
        self._prompts_as_chat = False
        self._heard = 0
        self._said = self._begun = time.monotonic()

    def __enter__(self) -> "_Asker":
        self._runner.run(self._model.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._runner.run(self._model.__aexit__(*error))
        finally:
            self._runner.close()
            self._shelf.__exit__(*error)

    def answers(self, questions: Sequence[Question]) -> list[Answer | None]:
        """The answer to each; None where there is none to learn from."""
        if not self._is_read:
            for name, content in _read(self._storage):
                self._shelf.put(name.encode(), content)
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
            said = {name: value for name, value in done.items() if value["text"].strip()}
            if said:
                self._storage.write_json(f"{digest_of({'questions': list(said)})[7:39]}.json", said)

    def _counted(self, answer: Answer | None, refusal: str) -> Answer | None:
        if answer is None:
            self._count.refused += 1
            self._count.first_refusal = self._count.first_refusal or refusal
            return None
        if not answer.text.strip():
            self._count.empty += 1
            return None
        self._count.cut += answer.cut
        return answer

    def _send(self, questions: Sequence[Question], hear: Callable[[int, Answer | RefusedQuestionError], None]) -> None:
        for chat in sorted({question.prompt is None for question in questions} - self._probed):
            self._probe(chat=chat)
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
            self._say(f"the teacher has answered {self._heard:,} prompts, {rate:.1f} a second")

    def _probe(self, *, chat: bool) -> None:
        """Find out whether the endpoint can be asked in this form, before anything is paid for."""
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


def _read(storage: Storage) -> Iterator[tuple[str, bytes]]:
    """The answers that are in the storage, as JSON, by the digest of their question. What cannot be read counts for nothing."""
    with storage_errors(storage.uri):
        storage.fs.invalidate_cache()
        names = [PurePosixPath(path).name for path in storage.fs.ls(storage.root, detail=False)] if storage.fs.exists(storage.root) else []
    for name in sorted(names):
        batch = storage.read_json(name) if name.endswith(".json") and not name.startswith(".") else None
        if isinstance(batch, dict):
            for digest, value in batch.items():
                yield digest, json.dumps(value).encode()


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
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, zlib.error):
        return None
    return answer if isinstance(answer.text, str) else None
