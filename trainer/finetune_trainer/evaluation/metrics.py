"""What an answer is worth beside its reference: scores of one text, and the counts that corpus metrics add up. Pure.

Each equals the value of what defines it: BLEU and chrF sacrebleu's, ROUGE rouge-score's (its own tokens, no stemming), F1 that of SQuAD.
Answers come from models that may say anything: texts are compared in Unicode's composed form (NFC), and what costs more than a pass over
the text looks at its first LONGEST characters only.
"""

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune_api.patterns import searcher

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

Array = npt.NDArray[np.float64]

LONGEST = 100_000
"""Characters of a text that overlaps are counted in."""
_LONGEST_WORD = 200
"""Characters between two spaces that are brought into composed form; a longer run of combining marks takes the square of its length."""

WORD_ORDERS = 4
"""Longest n-gram of words in BLEU."""
CHARACTER_ORDERS = 6
"""Longest n-gram of characters in chrF."""
BLEU_COUNTS, CHRF_COUNTS = 2 + 2 * WORD_ORDERS, 3 * CHARACTER_ORDERS
"""How many numbers they add up."""
_CHRF_RECALL = 4.0
"""Beta squared: recall weighs twice as much as precision."""

_ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, reference: str) -> float:
    """1.0 where both are the same text, but for space at the ends and the way its characters are composed."""
    return float(_composed(answer.strip()) == _composed(reference.strip()))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that both have, each as often as in both: without case, punctuation and articles (SQuAD 2.0, its own evaluation).

    Two texts without any word are the same: 1.0.
    """
    said, wanted = _plain_words(answer), _plain_words(reference)
    if not said or not wanted:
        return float(said == wanted)
    return _f1((Counter(said) & Counter(wanted)).total(), len(said), len(wanted))


def rouge_n(answer: str, reference: str, order: int) -> float | None:
    """ROUGE-N (Lin 2004): F1 of the n-grams of words. None where ROUGE has no words for the reference, as of Chinese."""
    said, wanted = _rouge_words(answer), _rouge_words(reference)
    if not wanted and _has_words(reference):
        return None
    those, these = _ngrams(said, order), _ngrams(wanted, order)
    return _f1((those & these).total(), those.total(), these.total())


def rouge_l(answer: str, reference: str) -> float | None:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words. None as in rouge_n."""
    said, wanted = _rouge_words(answer), _rouge_words(reference)
    if not wanted and _has_words(reference):
        return None
    return _f1(longest_common_subsequence(said, wanted), len(said), len(wanted))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, a row of the table at a time as the bits of one integer (Hyyrö 2004): 50,000 words with 50,000 take about a second."""
    long, short = (first, second) if len(first) >= len(second) else (second, first)
    places = dict.fromkeys(short, 0)
    for place, word in enumerate(long):
        if word in places:
            places[word] |= 1 << place
    everywhere = (1 << len(long)) - 1
    row = everywhere  # a zero wherever the subsequence so far grows by one
    for word in short:
        matches = row & places[word]
        row = ((row + matches) | (row - matches)) & everywhere
    return len(long) - row.bit_count()


def valid_json(answer: str) -> float:
    """1.0 where the whole answer is one JSON value by RFC 8259: without a fence around it, and without NaN and Infinity."""
    try:
        json.loads(answer, parse_constant=_refused, parse_int=len)  # an integer of any length is valid: nobody wants its value
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def matcher(pattern: str) -> Callable[[str], float]:
    """From an answer to 1.0 where the pattern is found somewhere in it; ^ and $ are its ends, without the space there.

    Takes time in proportion to the answer, whatever the pattern (see finetune_api.patterns). Raises ValueError.
    """
    found = searcher(pattern)
    return lambda answer: float(found(answer.strip()))


def bleu_counts(answer: str, reference: str) -> list[int]:
    """What BLEU adds up over a corpus: words of the answer, of the reference, common n-grams by order, n-grams of the answer by order."""
    score = _bleu().sentence_score(_cut(answer), [_cut(reference)])
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def bleu(counts: Array, *, effective_order: bool = False) -> Array:
    """BLEU (Papineni et al. 2002) in 0..100 of added counts [..., 10]: [...]. Tokens 13a, smoothed as in sacrebleu (exp).

    `effective_order` leaves orders out that the answer is too short for, as sacrebleu does for a single sentence.
    """
    said, wanted = counts[..., 0], counts[..., 1]
    common, all_ = counts[..., 2 : 2 + WORD_ORDERS], counts[..., 2 + WORD_ORDERS :]
    with np.errstate(divide="ignore", invalid="ignore"):
        missed = (common == 0) & (all_ > 0)
        precision = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), common) / all_
        logarithm = np.where(all_ > 0, np.log(precision), 0.0 if effective_order else -np.inf)
        orders = np.maximum(np.count_nonzero(all_ > 0, axis=-1), 1) if effective_order else WORD_ORDERS
        brevity = np.where(said < wanted, np.exp(1 - wanted / said), 1.0)
        score = 100 * brevity * np.exp(logarithm.sum(axis=-1) / orders)
    found: Array = np.where(common.any(axis=-1), score, 0.0)
    return found


def chrf_counts(answer: str, reference: str) -> list[int]:
    """What chrF adds up over a corpus, for each order: n-grams of the answer (0 where the reference has none), of the reference, common."""
    said, wanted = ("".join(_cut(text).split()) for text in (answer, reference))
    counts = []
    for order in range(1, CHARACTER_ORDERS + 1):
        those, these = (Counter(text[place : place + order] for place in range(len(text) - order + 1)) for text in (said, wanted))
        counts += [those.total() if these else 0, these.total(), (those & these).total()]
    return counts


def chrf(counts: Array) -> Array:
    """chrF2 (Popović 2015) in 0..100 of added counts [..., 18]: [...]. Characters without spaces, as sacrebleu does by default."""
    said, wanted, common = (counts[..., part::3] for part in range(3))
    there = (said > 0) & (wanted > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        orders = np.count_nonzero(there, axis=-1)
        precision = np.where(there, common / said, 0.0).sum(axis=-1) / orders
        recall = np.where(there, common / wanted, 0.0).sum(axis=-1) / orders
        score = 100 * (1 + _CHRF_RECALL) * precision * recall / (_CHRF_RECALL * precision + recall)
    found: Array = np.nan_to_num(score)
    return found


def _f1(common: int, said: int, wanted: int) -> float:
    return 2 * common / (said + wanted) if common else 0.0


def _plain_words(text: str) -> list[str]:
    return [word for word in _cut(text).lower().translate(_NO_PUNCTUATION).split() if word not in _ARTICLES]


def _rouge_words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", _cut(text).lower())


def _has_words(text: str) -> bool:
    return any(character.isalnum() for character in text[:LONGEST])


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _cut(text: str) -> str:
    return _composed(text[:LONGEST])


def _composed(text: str) -> str:
    """Unicode's composed form, word by word: nothing composes over a space."""
    if text.isascii():
        return text
    return "".join(unicodedata.normalize("NFC", word) if len(word) <= _LONGEST_WORD else word for word in re.split(r"(\s+)", text))


def _refused(constant: str) -> Any:  # noqa: ANN401 - json's own signature
    raise ValueError(constant)


@cache
def _bleu() -> "BLEU":
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)  # of no effect on the counts: it only keeps the library from advice for single sentences
