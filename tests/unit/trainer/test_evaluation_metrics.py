"""What an answer is worth: against the libraries that define it, by hand where none does, and with answers that no model should give."""

import time
import unicodedata
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import f1_score

from finetune_trainer.evaluation import metrics

PAIRS = [
    ("The cat sat on the mat.", "The cat sat on the mat."),
    ("the cat the cat on the mat", "There is a cat on the mat, and it sat."),
    ("It costs 3.50 euros, e.g. 2,000-3,000 cents!", "It costs 3.5 euros (that is 350 cents)."),
    ("", "An answer was wanted."),
    ("Something was said.", ""),
    ("", ""),
    ("no", "yes"),
    ("&quot;Quoted&quot; &amp; <tagged>", '"Quoted" & <tagged>'),
    ("Größe und Maß, naïve café", "Die Größe und das Maß: naïve Cafés"),
    ("one two three four five six seven eight", "eight seven six five four three two one"),
    ("a\nb\tc  d", "a b c d e"),
    ("你好世界 hello", "hello 世界你好"),
    ("well-known state-of-the-art", "well known state of the art"),
    ("word " * 40, "word " * 7),
]
ANSWERS, REFERENCES = ([pair[side] for pair in PAIRS] for side in (0, 1))


def sums(counts: Callable[[str, str], list[int]]) -> np.ndarray:
    return np.array([counts(*pair) for pair in PAIRS], np.float64)


def test_bleu_is_sacrebleus() -> None:
    assert metrics.bleu(sums(metrics.bleu_counts).sum(axis=0)) == pytest.approx(BLEU().corpus_score(ANSWERS, [REFERENCES]).score, abs=1e-9)


@pytest.mark.parametrize("pair", PAIRS)
def test_bleu_of_one_answer_is_sacrebleus(pair: tuple[str, str]) -> None:
    found = metrics.bleu(np.array(metrics.bleu_counts(*pair), np.float64), effective_order=True)
    assert found == pytest.approx(BLEU(effective_order=True).sentence_score(pair[0], [pair[1]]).score, abs=1e-9)


def test_bleu_of_many_corpora_at_once_is_that_of_each() -> None:
    """Subsets in which orders have no match or no n-gram at all, as in a resample."""
    chosen = np.random.default_rng(3).integers(0, 2, (200, len(PAIRS)))
    found = metrics.bleu(chosen @ sums(metrics.bleu_counts))
    for value, row in zip(found, chosen, strict=True):
        pairs = [pair for pair, taken in zip(PAIRS, row, strict=True) if taken]
        expected = BLEU().corpus_score([answer for answer, _ in pairs], [[reference for _, reference in pairs]]).score if pairs else 0.0
        assert value == pytest.approx(expected, abs=1e-9)


def test_chrf_is_sacrebleus() -> None:
    assert metrics.chrf(sums(metrics.chrf_counts).sum(axis=0)) == pytest.approx(CHRF().corpus_score(ANSWERS, [REFERENCES]).score, abs=1e-9)


def test_chrf_of_each_answer_is_sacrebleus() -> None:
    expected = [CHRF().sentence_score(answer, [reference]).score for answer, reference in PAIRS]
    assert metrics.chrf(sums(metrics.chrf_counts)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "世界" not in pair[1]])
def test_rouge_is_that_of_rouge_score(pair: tuple[str, str]) -> None:
    answer, reference = pair
    expected = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, answer)
    found = {
        "rouge1": metrics.rouge_n(answer, reference, 1),
        "rouge2": metrics.rouge_n(answer, reference, 2),
        "rougeL": metrics.rouge_l(answer, reference),
    }
    assert found == {name: pytest.approx(score.fmeasure, abs=1e-12) for name, score in expected.items()}


def test_rouge_is_none_where_it_has_no_words() -> None:
    """rouge-score knows the letters a to z alone: 0.0 for every Chinese answer would be a lie."""
    assert metrics.rouge_n("你好", "你好", 1) is None
    assert metrics.rouge_l("你好", "你好") is None
    assert metrics.rouge_l("hello", "...") == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_common_subsequence_is_that_of_the_table(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    first, second = (["abcdef"[index] for index in drawn.integers(0, 2 + seed, count)] for count in (150, 90))
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for row, one in enumerate(first, 1):
        for column, other in enumerate(second, 1):
            table[row][column] = table[row - 1][column - 1] + 1 if one == other else max(table[row - 1][column], table[row][column - 1])
    assert metrics.longest_common_subsequence(first, second) == table[-1][-1]


def items(text: str) -> set[tuple[str, int]]:
    """Each word with the number of the time it stands there, so that a set holds what a bag of words does."""
    seen: Counter[str] = Counter()
    found = set()
    for word in text.split():
        seen[word] += 1
        found.add((word, seen[word]))
    return found


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("paris is big", "paris"), ("red red blue", "red blue blue green"), ("one", "two"), ("x y z", "x y z"), ("b c b c b", "c b")],
)
def test_f1_is_that_of_scikit_learn_over_the_bag_of_words(answer: str, reference: str) -> None:
    said, wanted = items(answer), items(reference)
    everything = sorted(said | wanted)
    expected = f1_score([item in wanted for item in everything], [item in said for item in everything], zero_division=0.0)
    assert metrics.token_f1(answer, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),  # case, article and punctuation do not count
        ("in Paris, France", "Paris", 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # precision 1/3, recall 1
        ("a the an", "", 1.0),  # articles alone are no words, as the empty answer of SQuAD 2.0
        ("Paris", "", 0.0),
        ("", "Paris", 0.0),
        ("don't", "dont", 1.0),
        ("theatre", "a theatre", 1.0),  # an article is a whole word
    ],
)
def test_f1_by_hand(answer: str, reference: str, expected: float) -> None:
    assert metrics.token_f1(answer, reference) == pytest.approx(expected)


CAFE = "café"


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Paris", "Paris", 1.0),
        (" Paris\n", "Paris", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("a  b", "a b", 0.0),  # space inside counts
        ("", "", 1.0),
        ("  ", "", 1.0),
        ("", "Paris", 0.0),
        (unicodedata.normalize("NFD", CAFE), unicodedata.normalize("NFC", CAFE), 1.0),
        ("ﬁne", "fine", 0.0),  # a ligature is another text: NFC, not NFKC
    ],
)
def test_exact_match_by_hand(answer: str, reference: str, expected: float) -> None:
    assert metrics.exact_match(answer, reference) == expected


def test_every_overlap_takes_composed_and_decomposed_texts_for_the_same() -> None:
    texts = [unicodedata.normalize(form, "Ein Café am Übergang, naïv") for form in ("NFC", "NFD")]
    assert texts[0] != texts[1]
    assert metrics.token_f1(*texts) == metrics.rouge_l(*texts) == 1.0
    assert metrics.bleu(np.array(metrics.bleu_counts(*texts), np.float64)) == pytest.approx(100)
    assert metrics.chrf(np.array(metrics.chrf_counts(*texts), np.float64)) == pytest.approx(100)


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ("{}", True),
        (' {"a": [1, -0.5e3, null, true, "\\u00e9"]}\n', True),
        ('"text"', True),
        ("9" * 100_000, True),
        ("", False),
        ("{", False),
        ("{'a': 1}", False),
        ("[1,]", False),
        ("01", False),
        ("NaN", False),
        ("[-Infinity]", False),
        ('```json\n{"a": 1}\n```', False),
        ('{"a": 1} That is it.', False),
        ('"a\tb"', False),
        ("\ufeff{}", False),
        ("[" * 1_000_000, False),
        ('{"a":' * 100_000, False),
    ],
)
def test_json_by_hand(answer: str, valid: bool) -> None:
    assert metrics.valid_json(answer) == float(valid)


@pytest.mark.parametrize(
    ("pattern", "answer", "found"),
    [
        (r"\d{4}", "in 1984", True),
        (r"^\d{4}$", "in 1984", False),
        (r"^\d{4}$", "1984\n", True),
        ("(?i)yes", "YES!", True),
        ("é", "e", False),
        ("x", "", False),
        ("^$", "", True),
        (r"^a.b$", "a\nb", False),
        (r"(?s)^a.b$", "a\nb", True),
        ("a", "\ud800 a", True),  # half a character, as in JSON's "\ud800"
    ],
)
def test_a_pattern_is_searched_for(pattern: str, answer: str, found: bool) -> None:
    assert metrics.matcher(pattern)(answer) == float(found)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("a(", "unclosed group"), ("(?=a)b", "look-around"), (r"(a)\1", "backreferences"), (r"(\w{999}){9}", "size limit")],
)
def test_a_pattern_that_cannot_be_searched_for_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metrics.matcher(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "^(([a-z])+.)+[A-Z]([a-z])+$", "(?:a?){500}a{500}$", "(.*a){30}z"])
def test_a_catastrophic_pattern_takes_no_time(pattern: str) -> None:
    """Python's own engine needs more than the age of the universe for the first of them."""
    matches = metrics.matcher(pattern)
    start = time.process_time()
    assert matches("a" * 1_000_000 + "!") == 0.0
    assert time.process_time() - start < 2


HOSTILE = {
    "a megabyte": "lorem ipsum dolor " * 60_000,
    "one word": "x" * 1_000_000,
    "combining marks": "a" + "\u0301\u0316" * 500_000,
    "words of marks": ("a" + "\u0301\u0316" * 99 + " ") * 5000,
    "two words": "a b " * 250_000,
    "nothing but spaces": " " * 1_000_000,
    "zero": "\0" * 1000,
    "half characters": "\ud800 \udfff " * 1000,
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_answer_takes_long_or_raises(answer: str) -> None:
    start = time.process_time()
    for reference in ("A short reference.", answer[::-1]):
        scores = [
            metrics.exact_match(answer, reference),
            metrics.token_f1(answer, reference),
            metrics.rouge_n(answer, reference, 2) or 0.0,
            metrics.rouge_l(answer, reference) or 0.0,
            metrics.valid_json(answer),
            metrics.matcher("(a+)+$")(answer),
            float(metrics.bleu(np.array(metrics.bleu_counts(answer, reference), np.float64))) / 100,
            float(metrics.chrf(np.array(metrics.chrf_counts(answer, reference), np.float64))) / 100,
        ]
        assert all(0 <= score <= 1 + 1e-9 for score in scores)
    assert time.process_time() - start < 20
