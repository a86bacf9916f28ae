"""From examples to token ids and label masks.

Labels are told apart in the text, before it is cut into tokens: an example is rendered once, with the spans of characters that are to be
learnt, and a token is a label where it holds a character of such a span. So the tokens are those that the model will see in use.

    promptCompletion    prompt + completion + end token      completion: what follows the prompt
    text                text + end token                     all of it
    messages            the tokenizer's chat template        completion: the last assistant turn; assistant: every assistant turn

The span of a turn is what the template marks with `{% generation %}`. Where it marks nothing, it is what the template adds to the
conversation before the turn (as it stands when an answer is asked for); this needs a template that only ever adds.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from finetune_api.reasons import Reason
from finetune_trainer.data.formats import Conversation, Example, PromptCompletion
from finetune_trainer.data.rows import Fault, Place
from finetune_trainer.errors import JobError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["completion", "assistant", "all"]
Span = tuple[int, int]
Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
CHUNK = 512
"""Examples that are cut into tokens at once, on all cores."""


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
    spans: tuple[Span, ...]
    """Characters to learn, from and up to."""
    is_chat: bool
    """Whether the template has put the special tokens in."""


class Encoder:
    """A tokenizer, and what of an example is to be learnt."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._max_length = max_length

    def encode(self, examples: Sequence[Example]) -> Iterator[Encoded | Fault]:
        """The examples as tokens, in their order; a Fault for one that the chat template refuses.

        Raises JobError (ModelInvalid) where the tokenizer lacks what the format needs.
        """
        for start in range(0, len(examples), CHUNK):
            rendered = [self._render(example) for example in examples[start : start + CHUNK]]
            tokens = {is_chat: iter(self._tokenize(rendered, is_chat=is_chat)) for is_chat in (True, False)}
            for item in rendered:
                yield item if isinstance(item, Fault) else next(tokens[item.is_chat])

    def _render(self, example: Example) -> _Rendered | Fault:
        if isinstance(example, Conversation):
            return self._render_chat(example)
        if isinstance(example, PromptCompletion):
            text = example.prompt + example.completion
            start = 0 if self._loss_on == "all" else len(example.prompt)
            return _Rendered(example.place, text, ((start, len(text)),), is_chat=False)
        return _Rendered(example.place, example.text, ((0, len(example.text)),), is_chat=False)

    def _render_chat(self, example: Conversation) -> _Rendered | Fault:
        if not self._tokenizer.chat_template:
            raise JobError(Reason.MODEL_INVALID, "the model's tokenizer has no chat template, which data of the format messages needs")
        turns = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
        wanted = turns if self._loss_on == "assistant" else turns[-1:]
        try:
            text, marked = self._template(example, len(example.messages))
            if self._loss_on == "all":
                spans: list[Span] = [(0, len(text))]
            elif marked is not None:
                spans = marked if self._loss_on == "assistant" else marked[-1:]
            else:
                spans = [self._turn_span(example, turn, text) for turn in wanted]
        except _TemplateError as error:
            return Fault(example.place, str(error))
        return _Rendered(example.place, text, tuple(spans), is_chat=True)

    def _turn_span(self, example: Conversation, turn: int, text: str) -> Span:
        """The characters of one assistant turn. Raises _TemplateError."""
        before, _ = self._template(example, turn, ask=True) if turn else ("", None)
        is_last = turn == len(example.messages) - 1
        upto = text if is_last else self._template(example, turn + 1)[0]
        if text.startswith(before) and text.startswith(upto) and len(before) < len(upto):
            return len(before), len(upto)
        raise _TemplateError(
            f"the chat template writes messages[{turn}] differently when others follow, so its tokens cannot be told from the rest; "
            "use objective.sft.lossOn: all, or completion with conversations that end with the assistant's turn"
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

    def _tokenize(self, rendered: Sequence[_Rendered | Fault], *, is_chat: bool) -> Iterator[Encoded]:
        chosen = [item for item in rendered if isinstance(item, _Rendered) and item.is_chat is is_chat]
        if not chosen:
            return
        texts = [item.text for item in chosen]
        encoded = self._tokenizer(texts, add_special_tokens=not is_chat, return_offsets_mapping=True, verbose=False)
        for item, ids, offsets in zip(chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            tokens = np.array(ids, dtype=np.int32)
            labelled = self._labels(item, np.array(offsets, dtype=np.int64).reshape(-1, 2))
            if not is_chat:
                tokens, labelled = self._ended(tokens, labelled)
            yield Encoded(item.place, tokens[: self._max_length], labelled[: self._max_length], len(tokens))

    def _labels(self, item: _Rendered, offsets: npt.NDArray[np.int64]) -> Mask:
        """Whether each token, from and up to a character, holds one that is to be learnt."""
        if self._loss_on == "all":
            return np.ones(len(offsets), dtype=np.bool_)
        labelled = np.zeros(len(offsets), dtype=np.bool_)
        first, last = offsets[:, 0], offsets[:, 1]
        for start, end in item.spans:
            # Some tokenizers trim white space, so that a token of nothing else stands empty at its end.
            labelled |= (last > start) & ((first < end) | ((first == last) & (last == end)))
        return labelled

    def _ended(self, tokens: Tokens, labelled: Mask) -> tuple[Tokens, Mask]:
        """With the end token, which is learnt too: without it the model would not learn to stop."""
        end = self._tokenizer.eos_token_id
        if end is None:
            raise JobError(Reason.MODEL_INVALID, "the model's tokenizer has no end token (eos_token)")
        if len(tokens) and tokens[-1] == end:
            return tokens, np.concatenate([labelled[:-1], [True]])
        return np.append(tokens, np.int32(end)), np.append(labelled, True)


class _TemplateError(Exception):
    """A conversation that the chat template does not take, or whose turns cannot be told apart."""


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
