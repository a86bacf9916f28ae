from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data import runs
from finetune_trainer.data.runs import inside, prefix_sums, runs_of, token_parts, whole_examples
from finetune_trainer.data.writing import SplitWriter

WHOLE = (1 << 64) - 1
"""Python's numbers have no end, so that the polynomial can be worked out one token after the other."""


def mixed(token: int) -> int:
    value = (token + 1) * 0xBF58476D1CE4E5B9 & WHOLE
    return (value ^ value >> 29) * 0x94D049BB133111EB & WHOLE


def polynomial(tokens: list[int]) -> int:
    return sum(mixed(token) * pow(0x9E3779B97F4A7C15, place, 1 << 64) for place, token in enumerate(tokens)) & WHOLE


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(1, 10))
def test_a_run_is_its_polynomial(tokens: list[int], length: int) -> None:
    expected = [polynomial(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
    assert runs_of(prefix_sums(array(tokens)), length).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 300), max_size=9), max_size=8))
def test_a_whole_example_is_its_polynomial(documents: list[list[int]]) -> None:
    tokens = [token for document in documents for token in document]
    lengths = np.array([len(document) for document in documents], np.int64)
    assert whole_examples(prefix_sums(array(tokens)), lengths).tolist() == [polynomial(document) for document in documents]


def test_of_a_pair_the_order_counts() -> None:
    def pair(one: list[int], other: list[int]) -> int:
        return int(whole_examples(prefix_sums(array(one + other)), np.array([len(one), len(other)]), group=2)[0])

    assert len({pair([1, 2], [3]), pair([3], [1, 2]), pair([1], [2, 3]), pair([1, 2], [4])}) == 4
    assert pair([1, 2], [3]) == pair([1, 2], [3])


def test_runs_that_go_beyond_their_example_are_told() -> None:
    """Examples of 3, none, 2 tokens: runs of 2 begin inside at 0, 1 and 3."""
    owners, whole = inside(np.arange(5), 2, np.cumsum([3, 0, 2]))
    assert owners.tolist() == [0, 0, 0, 2, 2]
    assert whole.tolist() == [True, True, False, True, False]


def written(folder: Path, documents: list[list[int]]) -> Path:
    with SplitWriter(folder, "train") as writer:
        for document in documents:
            writer.add(array(document), np.ones(len(document), np.bool_))
    return folder


@pytest.mark.parametrize("group", [1, 2])
def test_a_split_is_read_in_parts_that_keep_groups_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    documents = [[number] * (number % 5) for number in range(20)]
    monkeypatch.setattr(runs, "AT_ONCE", 7)
    parts = list(token_parts(written(tmp_path, documents), "train", group))
    read = [np.split(tokens, np.cumsum(lengths)[:-1]) for _, tokens, lengths in parts]
    assert [document.tolist() for part in read for document in part] == documents
    assert [first for first, _, _ in parts] == np.cumsum([0, *(len(lengths) for _, _, lengths in parts)])[:-1].tolist()
    assert all(len(lengths) % group == 0 for _, _, lengths in parts)
    assert len(parts) > 4


def test_a_sample_is_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 10 tokens, a quarter of 400 tokens: every fourth part."""
    monkeypatch.setattr(runs, "AT_ONCE", 10)
    parts = list(token_parts(written(tmp_path, [[number] * 5 for number in range(80)]), "train", most=100))
    assert [first for first, _, _ in parts] == list(range(0, 80, 8))
    assert [tokens.tolist() for _, tokens, _ in parts][1] == [8] * 5 + [9] * 5
