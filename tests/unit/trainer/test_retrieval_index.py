"""Indices against the formulas they are named after, written out here, and the vectors that are kept."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.preparation import KnowledgeBase, Retriever
from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.retrieval import Passage, embedding, open_knowledge, read_passages
from finetune_trainer.retrieval.bm25 import WordIndex
from finetune_trainer.retrieval.documents import KnowledgeFiles
from finetune_trainer.retrieval.embedding import MeaningIndex, vectors_of
from finetune_trainer.retrieval.hybrid import HybridIndex, fused
from finetune_trainer.retrieval.search import Hit, best
from finetune_trainer.retrieval.words import Language
from finetune_trainer.sources import Location
from finetune_trainer.storage import Storage

TEXTS = ["red red fox", "red hen in a coop", "grey goose", "red hen in a coop", "fox and goose and fox"]
AXES = ["red", "fox", "hen", "goose"]


class Axes:
    """An encoder with an axis a word, which remembers what it was given; `purpose` adds nothing but is noted."""

    identity = "axes"

    def __init__(self, fails_at: str = "") -> None:
        self.seen: list[tuple[str, str | None]] = []
        self.fails_at = fails_at

    def embed(self, texts: Sequence[str], purpose: Literal["query", "document"] | None = None) -> npt.NDArray[np.float32]:
        if self.fails_at in texts:
            raise JobError(Reason.STORAGE_UNAVAILABLE, "a failure on the way")
        self.seen += [(text, purpose) for text in texts]
        counts = np.array([[text.split().count(axis) for axis in AXES] for text in texts], np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def storage_at(path: Path | None) -> Storage:
    if path is None:
        return Storage(MemoryFileSystem(), "/retrieval-test", "s3://bucket/out")
    return Storage(LocalFileSystem(), str(path), f"file://{path}")


def bm25(query: str, text: str) -> float:
    """Robertson and Zaragoza 2009, equation 3.15, with the weight ln(1 + (N - n + 1/2) / (n + 1/2)), which is never negative."""
    documents = [each.split() for each in TEXTS]
    mean = sum(map(len, documents)) / len(documents)
    words, score = Counter(text.split()), 0.0
    for word in query.split():
        having = sum(word in document for document in documents)
        weight = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        score += weight * words[word] / (words[word] + 1.5 * (1 - 0.75 + 0.75 * words.total() / mean))
    return score


@pytest.mark.parametrize("query", ["red", "red fox", "fox fox hen", "goose and", "a hen in a coop"])
def test_words_are_scored_by_bm25_and_equal_texts_stand_in_their_order(query: str) -> None:
    hits = WordIndex(TEXTS, Language()).search([query], 5)[0]
    wanted = {number: bm25(query, text) for number, text in enumerate(TEXTS) if set(query.split()) & set(text.split())}
    assert [hit.number for hit in hits] == sorted(wanted, key=lambda number: (-round(wanted[number], 6), number))
    assert [hit.score for hit in hits] == pytest.approx([wanted[hit.number] for hit in hits], rel=1e-5)


def test_the_library_says_nothing_on_its_way(caplog: pytest.LogCaptureFixture) -> None:
    WordIndex(TEXTS, Language()).search(["red"], 1)
    assert not caplog.records


def test_a_text_that_shares_no_word_is_not_found() -> None:
    assert WordIndex(TEXTS, Language()).search(["whale", "", "goose"], 1) == [(), (), (Hit(2, pytest.approx(bm25("goose", TEXTS[2]))),)]
    assert WordIndex([], Language()).search(["whale"], 3) == [()]
    assert WordIndex(["--"], Language()).search(["--"], 3) == [()]


def test_other_endings_are_found_in_a_language_that_is_known() -> None:
    texts = ["The deliveries of the day are in the yard.", "It is what it is, and they are where they are."]
    assert [hit.number for hit in WordIndex(texts).search(["what is to be delivered by delivery"], 2)[0]] == [0]


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=12), st.integers(1, 14))
def test_the_best_are_those_that_a_sort_puts_first(scores: list[float], most: int) -> None:
    hits = best(np.array(scores, np.float32), most, above=0.0)
    assert [hit.number for hit in hits] == [
        number for number in sorted(range(len(scores)), key=lambda number: (-scores[number], number)) if scores[number] > 0
    ][:most]


def test_meanings_are_compared_by_their_cosine_however_the_work_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = Axes().embed(TEXTS)
    queries = ["red fox", "goose", "hen hen red"]
    cosines = Axes().embed(queries) @ vectors.T
    wanted = [sorted(range(5), key=lambda number, row=row: (-round(float(row[number]), 6), number))[:3] for row in cosines]
    embedder = Axes()
    for block, together in ((1 << 16, 256), (2, 2), (1, 1)):
        monkeypatch.setattr(embedding, "_BLOCK", block)
        monkeypatch.setattr(embedding, "_QUERIES", together)
        found = MeaningIndex(embedder, vectors).search(queries, 3)
        assert [[hit.number for hit in hits] for hits in found] == wanted
        for row, hits in zip(cosines, found, strict=True):
            assert [hit.score for hit in hits] == pytest.approx([row[hit.number] for hit in hits])
    assert set(embedder.seen) == {(query, "query") for query in queries}


def test_rankings_are_fused_by_the_sum_of_reciprocal_ranks() -> None:
    hits = fused([(Hit(7, 9.0), Hit(3, 8.0), Hit(5, 1.0)), (Hit(3, 0.9), Hit(9, 0.8)), ()], 3)
    assert [(hit.number, hit.score) for hit in hits] == [(3, 1 / 62 + 1 / 61), (7, 1 / 61), (9, 1 / 62)]
    assert fused([(), ()], 3) == ()


def test_a_hybrid_finds_what_either_finds() -> None:
    hybrid = HybridIndex([WordIndex(TEXTS, Language()), MeaningIndex(Axes(), Axes().embed(TEXTS))])
    assert [hit.number for hit in hybrid.search(["grey fox"], 3)[0]] == [4, 2, 0]
    # by words 2, 4, 0; by meaning 4, 0, 1, 2, 3: 1/62 + 1/61, 1/61 + 1/64, 1/63 + 1/62


@pytest.mark.parametrize("is_local", [True, False])
def test_vectors_are_kept_part_by_part_and_again_computed_where_they_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    monkeypatch.setattr(embedding, "PART", 2)
    storage, said = storage_at(tmp_path if is_local else None), list[str]()
    if not is_local and storage.fs.exists(storage.root):
        storage.fs.rm(storage.root, recursive=True)
    texts = ["red", "fox", "hen", "goose", "red fox"]
    with pytest.raises(JobError, match="on the way"):
        vectors_of(texts, Axes(fails_at="goose"), "team", storage, said.append)
    embedder = Axes()
    vectors = vectors_of(texts, embedder, "team", storage, said.append)
    assert [text for text, _ in embedder.seen] == ["hen", "goose", "red fox"]
    assert {purpose for _, purpose in embedder.seen} == {"document"}
    assert np.array_equal(vectors, Axes().embed(texts))
    assert said == ["2 of 5 passages are embedded", "4 of 5 passages are embedded", "5 of 5 passages are embedded"]

    files = [path for path in storage.fs.find(storage.root) if path.endswith("000001/vectors.npy")]
    storage.fs.pipe_file(files[0], storage.fs.cat_file(files[0])[:-4] + b"\1\2\3\4")
    embedder = Axes()
    assert np.array_equal(vectors_of(texts, embedder, "team", storage, said.append), vectors)
    assert [text for text, _ in embedder.seen] == ["hen", "goose"]
    embedder = Axes()
    assert np.array_equal(vectors_of(texts, embedder, "team", storage, said.append), vectors)
    assert embedder.seen == []


def test_other_texts_encoders_and_places_have_vectors_of_their_own(tmp_path: Path) -> None:
    storage = storage_at(tmp_path)
    vectors_of(["red"], Axes(), "team", storage, print)
    for texts, name, where in ((["fox"], "axes", "team"), (["red"], "other", "team"), (["red"], "axes", "another team")):
        embedder = Axes()
        embedder.identity = name
        vectors_of(texts, embedder, where, storage, print)
        assert len(embedder.seen) == 1


PASSAGES = tuple(Passage(f"{number}.md", "", text) for number, text in enumerate(TEXTS))


@pytest.mark.parametrize(
    ("kind", "loads", "found"), [("bm25", 0, ["2.md", "4.md"]), ("embedding", 1, ["4.md", "0.md"]), ("hybrid", 1, ["4.md", "2.md"])]
)
def test_a_retriever_finds_as_its_kind_says(tmp_path: Path, kind: str, loads: int, found: list[str]) -> None:
    embedder = Axes()
    loaded: list[Axes] = []

    def load() -> Axes:
        loaded.append(embedder)
        return embedder

    retriever = Retriever.model_construct(kind=kind, passages=2, encoder=None)
    knowledge = open_knowledge(PASSAGES, retriever, load, storage_at(tmp_path), print, namespace="team")
    assert [passage.place for passage in knowledge.retrieve(["grey fox"], 2)[0]] == found
    assert len(loaded) == loads


def test_passages_are_read_as_the_knowledge_base_says_and_told_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"w{number}" for number in range(20)))
    (tmp_path / "b.csv").write_text("x")
    files = KnowledgeFiles(Location(LocalFileSystem(), str(tmp_path), "pvc://docs/kb"), "field")
    said: list[str] = []
    passages = read_passages(KnowledgeBase(source="pvc://docs/kb", passage_words=12, overlap_words=4), files, said.append)
    assert [len(passage.text.split()) for passage in passages] == [12, 12]
    assert said == ["field: 2 passages of 1 document; 1 file of other forms left out"]
    (tmp_path / "a.txt").write_text("* * *")
    with pytest.raises(JobError, match="field: pvc://docs/kb holds no words") as caught:
        read_passages(KnowledgeBase(source="pvc://docs/kb"), files, said.append)
    assert caught.value.reason is Reason.KNOWLEDGE_BASE_INVALID
