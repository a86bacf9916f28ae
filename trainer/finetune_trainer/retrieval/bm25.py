"""Texts found by their words: BM25 (Robertson and Zaragoza 2009, k1 1.5, b 0.75) as Lucene weighs words, by bm25s."""

import logging
from collections.abc import Sequence

from finetune_trainer.retrieval.search import Hit, best
from finetune_trainer.retrieval.words import Language, language_of


class WordIndex:
    """An index of words. A text that shares no word with a query is not found by it."""

    def __init__(self, texts: Sequence[str], language: Language | None = None) -> None:
        """The language is that of the texts where it is not given. Memory: some ten bytes for each word of the texts."""
        from bm25s import BM25

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
        self.language = language_of(texts) if language is None else language
        self._numbers: dict[str, int] = {}
        documents = [[self._numbers.setdefault(stem, len(self._numbers)) for stem in self.language.stems(text)] for text in texts]
        self._index = None
        if self._numbers:
            self._index = BM25(k1=1.5, b=0.75, method="lucene", backend="numpy")
            self._index.index((documents, self._numbers), create_empty_token=False, show_progress=False)

    def search(self, queries: Sequence[str], most: int) -> list[tuple[Hit, ...]]:
        """See search.Index. A word counts as often as the query has it."""
        return [self._found(query, most) for query in queries]

    def _found(self, query: str, most: int) -> tuple[Hit, ...]:
        known = [self._numbers[stem] for stem in self.language.stems(query) if stem in self._numbers]
        if self._index is None or not known:
            return ()
        return best(self._index.get_scores_from_ids(known), most, above=0.0)
