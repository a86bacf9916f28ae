"""What a model says: answers to prompts and conversations, and how well it would have said a reference.

The text of an answer is what transformers' own greedy `generate` gives for what is published, with the end tokens that serving goes by:
those of the model's generation configuration and the tokenizer's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from finetune_api.estimate import AUTO_TOKENS
from finetune_api.reasons import Reason
from finetune_trainer.data.batches import Row, micro_batches
from finetune_trainer.data.encoding import Encoder, LossOn
from finetune_trainer.data.examples import Examples, join
from finetune_trainer.data.formats import Conversation, PromptCompletion, Text
from finetune_trainer.data.rows import Fault, Place
from finetune_trainer.data.shares import Limit
from finetune_trainer.data.tensors import MicroBatch, collate
from finetune_trainer.data.tokenising import Marked, Tokeniser
from finetune_trainer.decoding import Bounds, Decoder, logits_at
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.model import CausalModel
from finetune_trainer.remedy import Notes, Remedy, Work
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_TOKENS: dict[str, int] = {"cpu": 16384, "cuda": 32768}
"""Positions whose keys and values are held at once, by device."""
ANSWERING = Work(
    "answers did not fit into memory: {limit} are held at once now, and they stay what they were",
    "a single example does not fit into the memory of a worker: lower maxNewTokens, or shorten the prompts of evaluation.suites",
)
MEASURING = Work(
    "references did not fit into memory: {limit} are measured at once now, with the same figures",
    "a single example does not fit into the memory of a worker: lower training.maxSequenceLength",
)
NOTES = {ANSWERING: "answers-at-once.json", MEASURING: "references-at-once.json"}
LOGITS = 1 << 24
"""Logits that exist at once where references are measured: 64 MiB."""


@dataclass(frozen=True)
class Voice:
    """A model that can be asked, and how to ask it."""

    model: CausalModel
    tokenizer: "PreTrainedTokenizerBase"
    longest: int | None = None
    """Positions that the model was made for, a soft prompt included; None where it does not say."""

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its answer may have together."""
        return None if self.longest is None else self.longest - self.model.virtual_tokens

    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        configured = getattr(self.model.transformer.generation_config, "eos_token_id", None)
        several = configured if isinstance(configured, list | tuple) else [configured]
        return frozenset(int(token) for token in (*several, self.tokenizer.eos_token_id) if token is not None)


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    too_long: bool = False
    """Whether the prompt left no room for a single token: the text is empty then."""


class Speaker:
    """Asks one model. Where that is sharded, every worker has one, and calls `finish` when it has no more to ask.

    `worker` says with whom; `tokens` is how many positions are held at once, where that is not to follow from the device; `storage` is the
    folder in which workers that must begin anew leave how many did not fit.
    """

    def __init__(self, voice: Voice, worker: Worker | None = None, *, tokens: int | None = None, storage: Storage | None = None) -> None:
        self.voice = voice
        self._warnings = list[str]()
        self._decoder = Decoder(voice.model, worker)
        self._tokeniser = Tokeniser(voice.tokenizer)
        self._ends = voice.ends()
        device = voice.model.device.type
        self._answering = self._remedy(ANSWERING, tokens or HELD_TOKENS[device], storage)
        self._measuring = self._remedy(MEASURING, AUTO_TOKENS[device], storage)
        if storage is not None and voice.model.sharded:
            self._answering.resume(worker or Worker())
            self._measuring.resume(worker or Worker())

    def _remedy(self, work: Work, tokens: int, storage: Storage | None) -> Remedy:
        notes = Notes(storage, NOTES[work]) if storage is not None else None
        return Remedy(work, self.voice.model, Limit("auto", tokens), self._warnings.append, notes)

    def prompt(self, case: Case) -> list[int]:
        """The tokens of what is asked, at least one. Raises JobError (DatasetInvalid) where the chat template refuses it."""
        tokenizer = self.voice.tokenizer
        if case.messages:
            tokens = self._tokens(self._rendered(case), special=False)
        else:
            tokens = self._tokens(case.prompt or "", special=True)
            while tokens and tokens[-1] == tokenizer.eos_token_id:  # some tokenizers put it after every text
                tokens.pop()
        if tokens:
            return tokens
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise JobError(Reason.MODEL_INVALID, "the model's tokenizer has no token that an empty prompt could begin with")
        return [int(begin)]

    def replies(self, prompts: Sequence[Sequence[int]], most: int) -> list[Reply]:
        """What the model says to each prompt, at most so many tokens, and no more than its context has room for.

        Raises JobError (GPUOutOfMemory; WorkersLost where all workers must begin anew).
        """
        context = self.voice.context
        room = [most if context is None else max(0, min(most, context - len(prompt))) for prompt in prompts]
        made: list[list[int]] = [[] for _ in prompts]
        taken = self.voice.model.virtual_tokens

        def follow(batch: Sequence[int]) -> list[list[int]]:
            return self._decoder.follow([prompts[each] for each in batch], [room[each] for each in batch], self._ends)

        def held(batch: Sequence[int]) -> int:
            return len(batch) * max(len(prompts[each]) + room[each] + taken for each in batch)

        asked = [index for index, count in enumerate(room) if count > 0]
        batches = Bounds(self._answering.limit.most).batches([len(prompts[index]) + room[index] + taken for index in asked])
        with self._decoder.ready():
            for batch, rows in self._answering.each([[asked[place] for place in batch] for batch in batches], held, follow):
                for index, row in zip(batch, rows, strict=True):
                    made[index] = row
        texts = [self.voice.tokenizer.decode(row, skip_special_tokens=True) for row in made]
        return [Reply(str(text), too_long=count == 0 and most > 0) for text, count in zip(texts, room, strict=True)]

    def measured(self, examples: Examples) -> list[Answered]:
        """Of each example the summed loss of its labels, their number, and how many of them were found. The ids are numbers.

        It is what `evaluation.measure` takes the mean of. Raises JobError as `replies` does.
        """
        model, lengths = self.voice.model, examples.lengths() + self.voice.model.virtual_tokens
        limit, padded = self._measuring.limit, model.layout == "padded"
        found: dict[int, Answered] = {}

        def see(rows: Sequence[Row]) -> list[Answered]:
            self._decoder.lockstep.before()
            return _scores(model, collate(examples, rows, model.layout).to(model.device))

        def taken(rows: Sequence[Row]) -> int:
            return limit.taken(rows, lengths, padded=padded)

        order = [(index,) for index in sorted(range(len(examples)), key=lambda index: -lengths[index])]
        with self._decoder.ready():
            for rows, scores in self._measuring.each(list(micro_batches(order, lengths, "auto", limit.tokens, padded=padded)), taken, see):
                found |= {index: score for (index,), score in zip(rows, scores, strict=True)}
        return [replace(found[index], id=str(index)) for index in range(len(examples))]

    def finish(self) -> None:
        """Let other workers end what they compute."""
        with self._decoder.ready():
            self._decoder.lockstep.finish()

    def settle(self, worker: Worker) -> tuple[str, ...]:
        """Have all workers hold as little at once as any of them has had to. Every worker calls it. Returns what is new to tell of that."""
        for remedy in (self._answering, self._measuring):
            remedy.settle(worker, worker.sum(float(remedy.mended)))
        told = tuple(self._warnings)
        self._warnings.clear()
        return told

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        ((tokens, _),) = self._tokeniser.tokens([Marked(text, None)], add_special_tokens=special)
        return [int(token) for token in tokens]

    def _rendered(self, case: Case) -> str:
        """The conversation as the chat template has it where an answer is asked for; where there is none, its texts one after the other."""
        tokenizer = self.voice.tokenizer
        if not tokenizer.chat_template:
            return "\n\n".join(str(message.get("content", "")) for message in case.messages) + "\n\n"
        try:
            return str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in case.messages],
                    tools=[dict(tool) for tool in case.tools] or None,
                    add_generation_prompt=True,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template is a program of the model's author, and may raise anything
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            place = case.place or f"example {case.id}"
            raise JobError(Reason.DATASET_INVALID, f"{place}: the chat template refuses the messages: {detail}") from error


def references(cases: Sequence[Case], tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn, max_length: int) -> Examples:
    """The cases with their references as tokens and labels, as prepared data has them: one example for each case.

    A case without a reference is a plain text, all of which counts. An example longer than `max_length` is cut there, as data is.
    Raises JobError (DatasetInvalid) where the chat template refuses a conversation.
    """
    encoded = Encoder(tokenizer, loss_on, max_length).encode(_example(case) for case in cases)
    parts = []
    for case, item in zip(cases, encoded, strict=True):
        if isinstance(item, Fault):
            raise JobError(Reason.DATASET_INVALID, f"{case.place or f'example {case.id}'}: {item.problem}")
        parts.append((item.tokens, item.labelled))
    return join(parts)


def _example(case: Case) -> Conversation | PromptCompletion | Text:
    place = Place(case.place or case.id, 1)
    if case.messages:
        said = dict(case.turn) if case.turn else {"role": "assistant", "content": case.reference}
        answer = (said,) if case.reference else ()
        return Conversation(place, (*map(dict, case.messages), *answer), tuple(map(dict, case.tools)))
    if not case.reference:
        return Text(place, case.prompt or "")
    return PromptCompletion(place, case.prompt or "", case.reference)


def _scores(model: CausalModel, batch: MicroBatch) -> list[Answered]:
    """Of each example of a micro-batch, in its order."""
    outputs = model.run(batch, logits=not model.plain_head)
    made = outputs.logits if outputs.last is None else outputs.last
    targets = batch.targets.view(-1)[batch.label_positions]
    count = len(batch.document_lengths)
    owners = torch.repeat_interleave(torch.arange(count), torch.tensor(batch.document_labels)).to(model.device)
    sums = torch.zeros(2, count, dtype=torch.float64, device=model.device)
    at_once = max(1, LOGITS // model.transformer.config.get_text_config().vocab_size)
    for start in range(0, len(targets), at_once):
        part = slice(start, start + at_once)
        logits = logits_at(model, made, batch.label_positions[part])
        losses = torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")
        right = logits.argmax(dim=-1) == targets[part]
        sums.index_add_(1, owners[part], torch.stack([losses.double(), right.double()]))
    losses_of, right_of = sums.tolist()
    return [
        Answered("", loss=loss, labels=labels, correct=round(correct))
        for loss, labels, correct in zip(losses_of, batch.document_labels, right_of, strict=True)
    ]
