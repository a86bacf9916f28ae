"""From examples to token ids and label masks.

Labels are told apart in the text, before it is cut into tokens: an example is rendered once, with the spans of characters that are to be
learnt, and a token is a label where it holds a character of such a span. So the tokens are those that the model will see in use.

    promptCompletion    prompt + completion + end token      completion: what follows the prompt
    text                text + end token                     all of it
    messages            the tokenizer's chat template        completion: the last assistant turn; assistant: every assistant turn
    preference          as one of these, once with each      what follows the prompt: of messages, every assistant turn
                        answer

The span of a turn is what the template marks with `{% generation %}`. Where it marks nothing, it is what the template adds to the
conversation before the turn (as it stands when an answer is asked for); this needs a template that only ever adds.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finetune_api.reasons import Reason
from finetune_trainer.data.formats import Conversation, Example, Preference, PromptCompletion, Text
from finetune_trainer.data.rows import Fault, Place
from finetune_trainer.data.tokenising import Marked, Mask, Span, Tokeniser, Tokens
from finetune_trainer.errors import JobError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["completion", "assistant", "all"]
CHUNK = 512
"""Most examples that are cut into tokens at once, on all cores."""
CHUNK_CHARACTERS = 1 << 20
"""Characters at which a chunk is full: while it is worked on, each token costs some 150 bytes."""


@dataclass(frozen=True)
class Encoded:
    """One example as tokens: int32 [T] and bool [T]."""

    place: Place
    tokens: Tokens
    labelled: Mask
    full_length: int
    """Tokens before it was cut."""

    def has_labels(self) -> bool:
        """Whether there is anything to learn: the first token is never predicted."""
        return bool(self.labelled[1:].any())


@dataclass(frozen=True)
class _Rendered:
    place: Place
    text: str
    spans: tuple[Span, ...] | None
    """Characters to learn, from and up to; None for all."""
    is_chat: bool
    """Whether the template has put the special tokens in."""
    is_rejected: bool = False
    """Whether it is a preference's second answer; the first one is just before it."""


class Encoder:
    """A tokenizer, and what of an example is to be learnt."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._tokeniser = Tokeniser(tokenizer)
        self._loss_on = loss_on
        self._max_length = max_length

    def encode(self, examples: Iterable[Example | Fault]) -> Iterator[Encoded | Fault]:
        """The examples as tokens, in their order, faults among them; and a Fault for one that the chat template refuses.

        A preference gives two, the chosen answer and the rejected one, or one Fault. Where they are the same once they are cut, neither
        has a label: there is nothing to learn from them.

        A chunk is cut into tokens by a thread while the next one is read and rendered by this; no more than the two are held.
        Raises JobError (ModelInvalid) where the tokenizer lacks what the format needs, and what reading the examples raises, once all
        that came before it is given.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokens") as pool:
            coming: deque[Future[list[Encoded | Fault]]] = deque()
            ended: list[JobError] = []
            for chunk in self._chunks(examples, ended):
                coming.append(pool.submit(self._tokenize, chunk))
                if len(coming) > 1:
                    yield from coming.popleft().result()
            while coming:
                yield from coming.popleft().result()
        if ended:
            raise ended[0]

    def _chunks(self, examples: Iterable[Example | Fault], ended: list[JobError]) -> "Iterator[list[_Rendered | Fault]]":
        """Rendered examples, as many as are cut into tokens at once. An error that ends them is put into `ended`."""
        chunk: list[_Rendered | Fault] = []
        characters = 0
        for example in _until_error(examples, ended):
            rendered = self._both(example) if isinstance(example, Preference) else [self._render(example)]
            chunk += rendered
            characters += sum(len(item.text) for item in rendered if isinstance(item, _Rendered))
            if len(chunk) >= CHUNK or characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
        if chunk:
            yield chunk

    def _both(self, example: Preference) -> "list[_Rendered | Fault]":
        """Both answers, or what is wrong with one of them."""
        chosen, rejected = self._render(example.chosen), self._render(example.rejected)
        if isinstance(chosen, Fault) or isinstance(rejected, Fault):
            return [chosen if isinstance(chosen, Fault) else rejected]
        return [chosen, replace(rejected, is_rejected=True)]

    def _render(self, example: Conversation | PromptCompletion | Text | Fault) -> _Rendered | Fault:
        if isinstance(example, Fault):
            return example
        if isinstance(example, Conversation):
            return self._render_chat(example)
        if isinstance(example, PromptCompletion):
            text = example.prompt + example.completion
            spans = None if self._loss_on == "all" else ((len(example.prompt), len(text)),)
            return _Rendered(example.place, text, spans, is_chat=False)
        return _Rendered(example.place, example.text, None, is_chat=False)

    def _render_chat(self, example: Conversation) -> _Rendered | Fault:
        if not self._tokenizer.chat_template:
            raise JobError(Reason.MODEL_INVALID, "the model's tokenizer has no chat template, which data of the format messages needs")
        first = example.prompt_turns or 0
        turns = [index for index, message in enumerate(example.messages) if index >= first and message["role"] == "assistant"]
        wanted = turns if self._loss_on == "assistant" or example.prompt_turns is not None else turns[-1:]
        try:
            text, marked = self._template(example, len(example.messages))
            if self._loss_on == "all":
                spans: list[Span] | None = None
            elif marked is not None:
                spans = marked[-len(wanted) :] if first or self._loss_on != "assistant" else marked
            else:
                spans = [self._turn_span(example, turn, text) for turn in wanted]
        except _TemplateError as error:
            return Fault(example.place, str(error))
        return _Rendered(example.place, text, None if spans is None else tuple(spans), is_chat=True)

    def _turn_span(self, example: Conversation, turn: int, text: str) -> Span:
        """The characters of one assistant turn. Raises _TemplateError."""
        before, _ = self._template(example, turn, ask=True) if turn else ("", None)
        is_last = turn == len(example.messages) - 1
        upto = text if is_last else self._template(example, turn + 1)[0]
        if text.startswith(before) and text.startswith(upto) and len(before) < len(upto):
            return len(before), len(upto)
        raise _TemplateError(
            f"the chat template writes messages[{turn}] differently when others follow, so its tokens cannot be told from the rest; "
            + (
                "use objective.sft.lossOn: all, or completion with conversations that end with the assistant's turn"
                if example.prompt_turns is None
                else "let each answer be one turn"
            )
        )

    def _template(self, example: Conversation, turns: int, *, ask: bool = False) -> tuple[str, list[Span] | None]:
        """The first turns as text, and the spans that the template marks as generated (None where it marks nothing).

        Raises _TemplateError.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            template: Any = self._tokenizer.get_chat_template(None, list(example.tools) or None)
        except ValueError as error:  # several named templates, and none of them the default
            raise JobError(Reason.MODEL_INVALID, f"the model's tokenizer: {str(error).splitlines()[0]}") from error
        marks = bool(_GENERATION.search(template))
        try:
            texts, spans = render_jinja_template(
                conversations=[list(example.messages[:turns])],
                tools=list(example.tools) or None,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=ask,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template is a program of the model's author, and may raise anything
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise _TemplateError(f"the chat template refuses the messages: {detail}") from error
        return texts[0], [(start, end) for start, end in spans[0]] if marks else None

    def _tokenize(self, chunk: "Sequence[_Rendered | Fault]") -> list[Encoded | Fault]:
        """A chunk as tokens, in its order."""
        rendered = [item for item in chunk if isinstance(item, _Rendered)]
        tokens = {is_chat: self._tokens_of(rendered, is_chat=is_chat) for is_chat in (True, False)}
        encoded: list[Encoded | Fault] = []
        for item in chunk:
            one = item if isinstance(item, Fault) else next(tokens[item.is_chat])
            before = encoded[-1] if encoded else None
            if isinstance(one, Encoded) and isinstance(before, Encoded) and _is_same_answer(item, one, before):
                encoded[-1], one = _without_labels(before), _without_labels(one)
            encoded.append(one)
        return encoded

    def _tokens_of(self, rendered: "Sequence[_Rendered]", *, is_chat: bool) -> Iterator[Encoded]:
        """Those of one kind, in their order: a chat template has written the special tokens already."""
        chosen = [item for item in rendered if item.is_chat is is_chat]
        texts = [Marked(item.text, item.spans) for item in chosen]
        for item, (tokens, labelled) in zip(chosen, self._tokeniser.tokens(texts, add_special_tokens=not is_chat), strict=True):
            if not is_chat:
                tokens, labelled = self._ended(tokens, labelled)  # noqa: PLW2901 - the same with its end
            yield Encoded(item.place, tokens[: self._max_length], labelled[: self._max_length], len(tokens))

    def _ended(self, tokens: Tokens, labelled: Mask) -> tuple[Tokens, Mask]:
        """With the end token, which is learnt too: without it the model would not learn to stop."""
        end = self._tokenizer.eos_token_id
        if end is None:
            raise JobError(Reason.MODEL_INVALID, "the model's tokenizer has no end token (eos_token)")
        if len(tokens) and tokens[-1] == end:
            return tokens, np.concatenate([labelled[:-1], [True]])
        return np.append(tokens, np.int32(end)), np.append(labelled, True)


def _until_error(examples: Iterable[Example | Fault], ended: list[JobError]) -> Iterator[Example | Fault]:
    """The examples up to an error, which is put into `ended`: what was read before it may be wrong too, and is to be told of."""
    try:
        yield from examples
    except JobError as error:
        ended.append(error)


def _is_same_answer(item: "_Rendered | Fault", one: Encoded, before: Encoded) -> bool:
    """Whether it is a rejected answer and, now that it is cut, the chosen one as well."""
    return isinstance(item, _Rendered) and item.is_rejected and np.array_equal(one.tokens, before.tokens)


def _without_labels(one: Encoded) -> Encoded:
    return replace(one, labelled=np.zeros_like(one.labelled))


class _TemplateError(Exception):
    """A conversation that the chat template does not take, or whose turns cannot be told apart."""


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
