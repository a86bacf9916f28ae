import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune_trainer.data import leakage, runs
from finetune_trainer.data.leakage import Leak, Some, leaks
from finetune_trainer.data.writing import SplitWriter

EXAMPLES = Path(__file__).parents[3] / "examples"
Documents = list[list[int]]


def write(folder: Path, split: str, documents: Documents) -> Some:
    with SplitWriter(folder, split) as writer:
        for document in documents:
            writer.add(np.array(document, np.int32), np.ones(len(document), np.bool_))
    return Some(split, np.ones(len(documents), np.bool_))


def found(folder: Path, train: Documents, held: Documents) -> list[tuple[int, int]]:
    return [(leak.example, leak.held) for leak in leaks(folder, write(folder, "train", train), [write(folder, "test", held)])]


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, length).tolist()


def test_by_hand(tmp_path: Path) -> None:
    """Of a held-out example of 17 tokens there are ten runs of eight: seven of them are in its first 14 tokens, six in its first 13."""
    held = list(range(17))
    others = [text(1, 30), [*held[:14], *text(2, 20)], [*held[:13], *text(3, 20)], [*text(4, 9), *held, *text(5, 9)], held[3:]]
    assert found(tmp_path, others, [text(6, 40), held]) == [(1, 1), (3, 1), (4, 1)]


def test_an_example_that_is_shorter_than_a_run_leaks_where_it_is_the_same(tmp_path: Path) -> None:
    assert found(tmp_path, [[1, 2, 3], [1, 2], [0, 1, 2], []], [[1, 2]]) == [(1, 0)]


def test_a_run_goes_over_no_boundary(tmp_path: Path) -> None:
    """Side by side the two training examples hold the held-out one."""
    held = text(1, 30)
    assert found(tmp_path, [held[:15], held[15:]], [held]) == []


def test_of_several_the_first_is_told(tmp_path: Path) -> None:
    one, other = text(1, 30), text(2, 30)
    train, split = write(tmp_path, "train", [other + one, text(3, 9)]), write(tmp_path, "test", [text(4, 30), one, other])
    assert leaks(tmp_path, train, [write(tmp_path, "validation", [text(5, 30)]), split]) == [Leak(0, 1, 1)]


def test_held_out_of_the_same_split(tmp_path: Path) -> None:
    """What is left out, on neither side, leaks nothing, and the places are those of the whole split."""
    one, other = text(1, 30), text(2, 30)
    documents = [text(3, 30), one, other, one, other, text(4, 30)]
    write(tmp_path, "all", documents)
    train, held = (np.array([place in places for place in range(6)]) for places in ((0, 1, 4), (3, 5)))
    assert leaks(tmp_path, Some("all", train), [Some("all", held)]) == [Leak(1, 0, 3)]
    assert leaks(tmp_path, Some("all", train), [Some("all", np.zeros(6, np.bool_))]) == []


def test_pairs_are_told_by_their_number(tmp_path: Path) -> None:
    """One of a pair's answers is enough; a suite's examples are no pairs."""
    one, other = text(1, 30), text(2, 30)
    write(tmp_path, "train", [text(3, 9), text(4, 9), other, text(5, 9)])
    write(tmp_path, "suite", [text(6, 9), one, other])
    train = Some("train", np.ones(2, np.bool_), group=2)
    assert leaks(tmp_path, train, [Some("suite", np.ones(3, np.bool_))]) == [Leak(1, 0, 2)]


def test_what_many_examples_have_says_nothing(tmp_path: Path) -> None:
    """A system prompt of 300 tokens and a question of 10: only the examples with the same question leak."""
    system = text(1, 300)
    train = [system + text(10 + number, 10) for number in range(50)]
    held = [system + text(100 + number, 10) for number in range(50)]
    assert found(tmp_path, train, held) == []
    assert found(tmp_path, [*train, held[7]], held) == [(50, 7)]


def test_an_answer_that_many_questions_have_says_nothing(tmp_path: Path) -> None:
    answers = [text(number, 25) for number in range(3)]
    train = [text(100 + number, 8) + answers[number % 3] for number in range(60)]
    held = [text(200 + number, 8) + answers[number % 3] for number in range(9)]
    assert found(tmp_path, train, held) == []


def test_an_example_that_is_there_many_times_leaks_each_time(tmp_path: Path) -> None:
    one = text(1, 30)
    assert found(tmp_path, [one] * 30, [one]) == [(number, 0) for number in range(30)]


def test_of_a_long_example_some_runs_are_enough(tmp_path: Path) -> None:
    """Of 3000 tokens, 32 runs are known: where 95 of 100 are there, and where half are, they say so."""
    held = text(1, 3000)
    assert found(tmp_path, [held[:2850] + text(2, 150), held[:1500] + text(3, 1500), held[200:2950]], [held]) == [(0, 0), (2, 0)]


def by_definition(train: Documents, held: Documents) -> list[int]:
    """Training examples that leak, by the definition, with sets of tuples."""

    def each(document: list[int]) -> list[tuple[int, ...]]:
        return [tuple(document[start : start + leakage.RUN]) for start in range(len(document) - leakage.RUN + 1)]

    in_train, in_held = Counter(run for document in train for run in each(document)), Counter(run for one in held for run in each(one))
    common = {run for run, count in (*in_train.items(), *in_held.items()) if count > leakage.COMMON}
    leaking = []
    for place, document in enumerate(train):
        own = set(each(document))
        wanted = [set(each(one)) - common for one in held]
        holds = any(runs and len(runs & own) >= leakage.SHARE * len(runs) for runs in wanted)
        leaking += [place] if holds or document in held else []
    return leaking


pieces = st.lists(st.integers(0, 3), max_size=4).map(lambda numbers: [token for number in numbers for token in text(number, 9)])


@settings(max_examples=40, deadline=None)
@given(st.lists(pieces, max_size=6), st.lists(pieces, min_size=1, max_size=4), st.integers(5, 60))
def test_the_definition(tmp_path_factory: pytest.TempPathFactory, train: Documents, held: Documents, at_once: int) -> None:
    """Of examples that are short enough every run is known, so what is found is exact; parts of any size give the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "AT_ONCE", at_once)
        assert [example for example, _ in found(tmp_path_factory.mktemp("data"), train, held)] == by_definition(train, held)


def test_what_is_held_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a hundred runs, fifty examples have four each, and are still found."""
    monkeypatch.setattr(leakage, "_MOST", 100)
    held = [text(number, 60) for number in range(50)]
    assert found(tmp_path, [text(100, 60), held[31], text(101, 60) + held[7]], held) == [(1, 31), (2, 7)]


def test_the_quickstarts_data_do_not_leak_but_for_what_is_put_in(tmp_path: Path) -> None:
    """Its questions are all different; its fifty answers are each in many examples."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "models" / "tiny-llama")
    documents = {}
    for split in ("train", "validation", "test"):
        lines = (EXAMPLES / "data" / "support" / f"{split}.jsonl").read_text().splitlines()
        documents[split] = [tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False) for line in lines]
    held = documents["validation"] + documents["test"]
    assert found(tmp_path, documents["train"], held) == []
    assert found(tmp_path, [*documents["train"], held[5], held[100]], held) == [(990, 5), (991, 100)]
