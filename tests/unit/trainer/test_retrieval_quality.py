"""The labelled set, and how much of it is found: a floor that a change for the worse falls through."""

import pytest
from tests.bench.retrieval import Labelled, name_of, read_set, recall

from finetune_trainer.retrieval.bm25 import WordIndex
from finetune_trainer.retrieval.passages import Passage
from finetune_trainer.retrieval.search import Hit
from finetune_trainer.retrieval.words import Language


class Fixed:
    """An index that always finds the same."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def search(self, queries: list[str], most: int) -> list[tuple[Hit, ...]]:
        return [tuple(Hit(number, 1.0) for number in self.numbers[:most])] * len(queries)


def test_recall_is_the_share_of_relevant_passages_that_are_found() -> None:
    passages = tuple(Passage("kb/a.md", name, "text") for name in "xyz")
    labelled = (Labelled("one?", frozenset({"a.md#x"})), Labelled("two?", frozenset({"a.md#y", "a.md#z"})))
    assert recall(Fixed(0, 1, 2), passages, labelled, 1) == 0.5
    assert recall(Fixed(1, 0, 2), passages, labelled, 2) == 0.75
    assert recall(Fixed(2, 1, 0), passages, labelled, 3) == 1.0


def test_every_label_names_a_passage_and_every_form_is_there() -> None:
    passages, labelled = read_set()
    names = {name_of(passage) for passage in passages}
    assert all(each.relevant <= names for each in labelled)
    assert {passage.place.partition(",")[0].rpartition(".")[2] for passage in passages} == {"md", "html", "txt", "jsonl"}
    assert (len(passages), len(labelled)) == (58, 64)


@pytest.mark.parametrize(("depth", "least"), [(1, 0.65), (5, 0.78)])
def test_words_find_most_of_what_people_ask_for(depth: int, least: float) -> None:
    passages, labelled = read_set()
    texts = [passage.shown for passage in passages]
    found = recall(WordIndex(texts), passages, labelled, depth)
    assert found >= least
    assert found > recall(WordIndex(texts, Language()), passages, labelled, depth)  # endings and stop words count
