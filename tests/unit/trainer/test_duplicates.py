from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash

from finetune_trainer.data.duplicates import NEAR, PERMUTATIONS, duplicates, jaccard, shingles, signature
from finetune_trainer.data.examples import Examples, join
from finetune_trainer.data.writing import SplitWriter


def write(folder: Path, documents: list[list[int]]) -> Path:
    with SplitWriter(folder, "train") as writer:
        for document in documents:
            writer.add(np.array(document, np.int32), np.ones(len(document), np.bool_))
    return folder


def repeats(folder: Path, documents: list[list[int]], kind: str, group: int = 1) -> list[int]:
    return duplicates(write(folder, documents), "train", kind, group).tolist()


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, length).tolist()


def examples(*documents: list[int]) -> Examples:
    return join([(np.array(document, np.int32), np.ones(len(document), np.bool_)) for document in documents])


def sets(*documents: list[int]) -> list[set[tuple[int, ...]]]:
    """Shingles of five tokens, as sets."""
    return [{tuple(document[start : start + 5]) for start in range(len(document) - 4)} for document in documents]


def test_the_same_tokens_are_duplicates_of_the_first(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [1, 2, 3], [1, 2], [3], [4], [1, 2, 3], []]
    assert repeats(tmp_path, documents, "exact") == [-1, -1, 0, -1, -1, 1, 0, -1]


def test_pairs_are_duplicates_where_both_answers_are_the_same(tmp_path: Path) -> None:
    documents = [[1], [2], [1], [3], [1], [2], [2], [1]]
    assert repeats(tmp_path, documents, "exact", group=2) == [-1, -1, 0, -1]


def test_two_that_share_a_hash_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have the same hash here."""
    monkeypatch.setattr(
        "finetune_trainer.data.duplicates.whole_examples", lambda sums, lengths, group: np.full(len(lengths) // group, 7, np.uint64)
    )
    assert repeats(tmp_path, [[1, 2], [1, 3], [1, 2]], "exact") == [-1, -1, 0]


def test_the_jaccard_similarity_by_hand() -> None:
    """Nine tokens have five shingles; one other at the end changes the last, one in the middle all of them, and the first five are one."""
    base = list(range(9))
    pairs = [(base, 1.0), ([*base[:8], 99], 4 / 6), ([*base[:4], 99, *base[5:]], 0.0), (base[:5], 1 / 5), ([50], 0.0)]
    all_ = examples(base, *(other for other, _ in pairs))
    for place, (_, expected) in enumerate(pairs, 1):
        assert jaccard(shingles(all_, 0), shingles(all_, place)) == pytest.approx(expected)


def test_what_is_shorter_than_a_shingle_is_one(tmp_path: Path) -> None:
    assert repeats(tmp_path, [[1, 2], [1, 3], [1, 2], [], [5]], "near") == [-1, -1, 0, -1, -1]


def test_the_signatures_estimate_is_the_jaccard_similarity() -> None:
    """Of 128 values so many agree as the sets have in common: a binomial's standard error, of which five are allowed."""
    empty = MinHash(PERMUTATIONS, hashfunc=int)
    base = text(1, 400)
    for changed in (1, 4, 10, 30, 80):
        other = list(base)
        for place in np.linspace(10, 390, changed).astype(int):
            other[place] = 5000 + place
        one, two = sets(base, other)
        exact = len(one & two) / len(one | two)
        all_ = examples(base, other)
        estimate = (signature(shingles(all_, 0), empty) == signature(shingles(all_, 1), empty)).mean()
        assert jaccard(shingles(all_, 0), shingles(all_, 1)) == pytest.approx(exact)
        assert abs(estimate - exact) < 5 * np.sqrt(exact * (1 - exact) / PERMUTATIONS)


def edited(base: list[int], places: list[int]) -> list[int]:
    return [10_000 + place if place in places else token for place, token in enumerate(base)]


def test_near_duplicates_are_those_that_have_most_in_common(tmp_path: Path) -> None:
    """Of 296 shingles an edit changes five: 291 / 301 with one, 271 / 321 = 0.84 with five, 246 / 346 = 0.71 with ten."""
    base = text(1, 300)
    documents = [base, text(2, 300), edited(base, [100]), edited(base, [20, 80, 140, 200, 260]), edited(base, list(range(9, 300, 29))[:10])]
    assert repeats(tmp_path, documents, "near") == [-1, -1, 0, 0, -1]


def test_every_example_that_is_left_out_is_near_one_that_stays(tmp_path: Path) -> None:
    """A chain, each a little further from the first: the ones that are too far from it begin anew."""
    base = text(1, 300)
    chain = [edited(base, list(range(5, 5 + 10 * number, 10))) for number in range(25)]
    found = repeats(tmp_path, chain, "near")
    every = sets(*chain)
    kept = [place for place, first in enumerate(found) if first < 0]
    assert 1 < len(kept) < 15
    for place, first in enumerate(found):
        if first >= 0:
            assert found[first] == -1
            assert len(every[place] & every[first]) / len(every[place] | every[first]) >= NEAR


def test_near_duplicates_are_found(tmp_path: Path) -> None:
    """Two edits of 300 tokens leave 286 of 306 shingles: one is overlooked with a probability of (1 - 0.935**8)**16, one in a million."""
    documents = [text(seed, 300) for seed in range(200)]
    copies = [edited(document, [50, 200]) for document in documents]
    found = repeats(tmp_path, documents + copies, "near")
    assert found == [-1] * 200 + list(range(200))
