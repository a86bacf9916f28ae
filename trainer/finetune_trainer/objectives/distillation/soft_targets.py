"""An endpoint's probabilities as targets for the student, where both cut the answer into the same tokens.

The endpoint tells the bytes of each token of its answer and of the most probable ones in its place. Where the student's tokens of the
answer have the same bytes, one by one, the probabilities are of the student's own tokens; what the student has no token for goes to the
rest. Everywhere else the label itself is the target, with all the probability: the example keeps hard labels.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.encoding import Encoded
from finetune_trainer.objectives.distillation.teacher_cache import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_REST = 1e-6
"""Least probability of all that is not named: what is told is rounded."""
TopToken = tuple[bytes, Sequence[tuple[bytes, float]]]
"""A token of an answer, and the most probable ones in its place with the logarithm of their probability."""


@dataclass(frozen=True)
class VocabularyBytes:
    """What each token of a tokenizer stands for."""

    of: tuple[bytes, ...]
    """By its id."""
    ids: Mapping[bytes, int]
    """The id; the first where several stand for the same."""

    @classmethod
    def of_tokenizer(cls, tokenizer: "PreTrainedTokenizerBase") -> "VocabularyBytes":
        """Read from the tokenizer's own tables."""
        vocabulary = tokenizer.get_vocab()
        special = tokenizer.get_added_vocab()
        inner: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        by_byte = '"ByteLevel"' in json.dumps(inner.get("decoder"))
        every = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            every[index] = token.encode() if token in special else (_level_bytes(token) if by_byte else _piece_bytes(token))
        ids: dict[bytes, int] = {}
        for index, text in enumerate(every):
            if text:
                ids.setdefault(text, index)
        return cls(tuple(every), ids)


def _byte_characters() -> dict[str, int]:
    """The character that byte-level tokenizers write each byte as: itself where it can be seen, else one from 256 on (GPT-2's table)."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in seen}
    for place, byte in enumerate(byte for byte in range(256) if byte not in seen):
        table[chr(256 + place)] = byte
    return table


_BYTE_OF = _byte_characters()


def _level_bytes(token: str) -> bytes:
    """A token of a byte-level tokenizer."""
    return bytes(_BYTE_OF[character] for character in token) if all(character in _BYTE_OF for character in token) else token.encode()


def _piece_bytes(token: str) -> bytes:
    """A token of a SentencePiece tokenizer: `<0x0A>` is a byte, the lower block a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def soft_targets(example: Encoded, answer: Sequence[TopToken], vocabulary: VocabularyBytes, k: int) -> Kept | None:
    """What is kept at each label of an example, with the endpoint's probabilities of its answer, the last run of labels.

    None where the student cuts the answer into other tokens.
    """
    labels = np.flatnonzero(example.labelled[1:]) + 1
    if not len(labels) or not answer:
        return None
    run = labels[_last_run(labels) :]
    texts = [vocabulary.of[token] for token in example.tokens[run]]
    wanted = [text for text, _ in answer]
    found = _where(texts, wanted) or _where(texts, wanted[:-1])  # the last may be an end token that is not the student's
    if found is None:
        return None
    kept = hard_targets(example.tokens[labels], k)
    first = len(labels) - len(run) + found[0]
    for place in range(found[1]):
        _put(kept, first + place, answer[place][1], vocabulary)
    return kept


def hard_targets(tokens: npt.NDArray[np.int32], k: int) -> Kept:
    """The labels themselves, with all the probability."""
    log_probabilities = np.full((len(tokens), k + 1), -np.inf, np.float16)
    log_probabilities[:, 0] = 0.0
    return Kept(np.repeat(tokens[:, None], k, axis=1).astype(np.int32), log_probabilities)


def _last_run(labels: npt.NDArray[np.int64]) -> int:
    """Where the last run of consecutive positions begins."""
    breaks = np.flatnonzero(np.diff(labels) != 1)
    return int(breaks[-1]) + 1 if len(breaks) else 0


def _where(texts: Sequence[bytes], wanted: Sequence[bytes]) -> tuple[int, int] | None:
    """From which place on, and for how many, the student's tokens are these; they may be cut off at their end."""
    for start in range(len(texts)):
        count = min(len(wanted), len(texts) - start)
        if start > 1 and count < len(wanted):
            break
        # The first one alone rules out nearly every place, so that the cost is that of going through once.
        if count and texts[start] == wanted[0] and list(texts[start : start + count]) == list(wanted[:count]):
            return start, count
    return None


def _put(kept: Kept, row: int, top: Sequence[tuple[bytes, float]], vocabulary: VocabularyBytes) -> None:
    """The most probable tokens of one place, the likeliest first; hard where the student has none of them."""
    known: dict[int, float] = {}
    for text, log_probability in sorted(top, key=lambda item: -item[1]):
        index = vocabulary.ids.get(text)
        if index is not None and index not in known and math.isfinite(log_probability):
            known[index] = min(log_probability, 0.0)
    if not known:
        return
    chosen = list(known.items())[: kept.ids.shape[1]]
    kept.ids[row] = chosen[0][0]
    kept.log_probabilities[row] = -np.inf
    kept.ids[row, : len(chosen)] = [index for index, _ in chosen]
    kept.log_probabilities[row, : len(chosen)] = [value for _, value in chosen]
    named = sum(math.exp(value) for _, value in chosen)
    kept.log_probabilities[row, -1] = math.log(max(1.0 - named, LEAST_REST))
