"""Texts to token ids, on all cores: what of Encoder is the tokenizer's own Rust code, called with as little Python as can be.

The threads are the Rust library's; they run when TOKENIZERS_PARALLELISM is not false. Python is free meanwhile, so a caller that renders
the next texts in another thread gets that for nothing. Nothing here changes the tokenizer, so calls may overlap.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Marked:
    """A text, and the characters of it that are to be learnt, from and up to. `spans` is None where all of it is."""

    text: str
    spans: tuple[Span, ...] | None


class Tokeniser:
    """A fast tokenizer that neither cuts nor pads."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # some files ask for it
        self._backend.no_padding()

    def tokens(self, texts: Sequence[Marked], *, add_special_tokens: bool) -> Iterator[tuple[Tokens, Mask]]:
        """The tokens of each text, and which of them hold a character that is to be learnt."""
        # Where everything is learnt nobody asks which characters a token holds; to keep count of them halves the speed.
        needs_characters = any(item.spans is not None for item in texts)
        encode = self._backend.encode_batch if needs_characters else self._backend.encode_batch_fast
        encoded = encode([item.text for item in texts], add_special_tokens=add_special_tokens)
        encoded.reverse()
        for item in texts:
            one = encoded.pop()  # several times as large as what is kept of it
            tokens = np.array(one.ids, dtype=np.int32)
            if item.spans is None:
                yield tokens, np.ones(len(tokens), dtype=np.bool_)
            else:
                yield tokens, _held(item.spans, np.array(one.offsets, dtype=np.int64).reshape(-1, 2))


def _held(spans: Sequence[Span], characters: npt.NDArray[np.int64]) -> Mask:
    """Whether each token, which stands for characters [T, 2] from and up to, holds one of the spans'."""
    held = np.zeros(len(characters), dtype=np.bool_)
    first, last = characters[:, 0], characters[:, 1]
    for start, end in spans:
        # Some tokenizers trim white space, so that a token of nothing else stands empty at its end.
        held |= (last > start) & ((first < end) | ((first == last) & (last == end)))
    return held


def identity_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """`sha256:...` of all that tokens and rendered conversations follow from: the same for two models with the same tokenizer."""
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    inner |= {"truncation": None, "padding": None}  # of the last call
    whole = {
        "tokenizer": inner,
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "end": tokenizer.eos_token_id,
        "libraries": [version("tokenizers"), version("transformers")],
    }
    return f"sha256:{hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()}"
