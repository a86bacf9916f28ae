"""A teacher behind an endpoint: its answers take the place of the training data's own while the data is prepared.

They are kept (see asking.py). With topLogprobs the probabilities become targets (see objectives/distillation/soft_targets.py), which are
written beside the prepared data.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Endpoint, FineTuneJob
from finetune_trainer.asking import Asker, Count, Say, Served, batch_size, folder_of, identity_of, served
from finetune_trainer.completions import Answer, Question
from finetune_trainer.data.encoding import Encoded, Encoder
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.formats import Conversation, Example, PromptCompletion
from finetune_trainer.data.rows import Fault
from finetune_trainer.data.shelf import Shelf
from finetune_trainer.data_cache import mark_used
from finetune_trainer.endpoint import TEACHER
from finetune_trainer.errors import JobError
from finetune_trainer.objectives.distillation import teacher_cache
from finetune_trainer.objectives.distillation.soft_targets import VocabularyBytes, hard_targets, soft_targets
from finetune_trainer.objectives.distillation.teacher_cache import Kept
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage
from finetune_trainer.teacher import BESIDE_DATA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def endpoint_of(job: FineTuneJob) -> Endpoint | None:
    """The endpoint of a job whose teacher is served."""
    spec = job.spec.objective.distillation
    return spec.teacher.endpoint if spec is not None else None


@dataclass
class _Count(Count):
    """What became of the questions, and of the examples."""

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
        return identity_of(self.endpoint, self.namespace)

    def taught(self, examples: Iterable[Example | Fault]) -> Iterator[Example | Fault]:
        """The examples with the teacher's answers.

        Raises JobError (TeacherUnavailable, AuthenticationFailed, InvalidSpec, StorageFull, StorageUnavailable).
        """
        size = batch_size(self.endpoint)
        source = iter(examples)
        folder = folder_of(self.identity())
        mark_used(self.storage, folder)
        with Asker(Served(self.endpoint, self.key, TEACHER), self.storage.at(folder), self.count, self.say) as asker:
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
            raise TEACHER.failure(what)
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
    key = served(endpoint, TEACHER, mounts).key
    encoder = Encoder(tokenizer, spec.loss_on, job.spec.training.max_sequence_length)
    return EndpointTeacher(endpoint, job.metadata.namespace, key, storage, tokenizer, encoder, say)


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
