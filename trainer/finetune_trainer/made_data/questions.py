"""Questions: what a passage answers, with the answer that it gives."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune_api.preparation import Questions
from finetune_trainer.completions import Messages
from finetune_trainer.data.rows import Fault, Place, Row
from finetune_trainer.made_data.made import Means, Shape, Tally
from finetune_trainer.made_data.texts import Pair, filled, pairs_in
from finetune_trainer.made_data.writer import BATCH, Desk, Writer
from finetune_trainer.retrieval import Passage, read_passages
from finetune_trainer.retrieval.documents import KnowledgeFiles
from finetune_trainer.retrieval.grounding import Grounding
from finetune_trainer.retrieval.words import language_of, terms

FIELD = "data.preparation.questions"
LEAST = 16
"""Passages that are asked about together at least, once some were not enough."""
SHORTEST = 8
"""Words of a passage that something can be asked about."""


@dataclass(frozen=True)
class QuestionRows:
    """Rows that are made of passages: an Input."""

    spec: Questions
    files: KnowledgeFiles
    writer: Writer
    shape: Shape
    means: Means

    def identity(self) -> list[str]:
        """What the rows follow from: the settings, the documents and the generator."""
        settings = self.spec.model_dump(mode="json", by_alias=True)
        follows = [FIELD, settings, dict(self.writer.identity), self.shape.identity(), self.means.namespace]
        return [json.dumps(follows, sort_keys=True), *self.files.identity()]

    def state(self) -> list[str]:
        """What shows that the documents have changed."""
        return self.files.state()

    def rows(self) -> Iterator[Row | Fault]:
        """A row for each question whose answer its passage supports, as many as the limit allows; no question twice.

        Passages are taken in an order that is as good as random, so that a limit leaves out some of every document.
        Raises JobError (KnowledgeBaseInvalid, GeneratorUnavailable, DatasetInvalid, ...).
        """
        passages = read_passages(self.spec.knowledge_base, self.files, self.means.say)
        grounding = Grounding(language_of([passage.shown for passage in passages]), self.spec.min_support)
        asked = sorted((passage for passage in passages if len(terms(passage.text)) >= SHORTEST), key=_shuffled)
        tally, seen, at = Tally(FIELD, "passage", "answer"), set[str](), 0
        with Desk(self.writer, self.spec.max_new_tokens, self.means.storage, f"{FIELD}.generator", self.means.say) as desk:
            while at < len(asked) and tally.made < self.spec.limit:
                batch = asked[at : at + self._next(tally)]
                at += len(batch)
                texts, left = desk.write([self._asked(passage) for passage in batch]), self.spec.limit - tally.made
                made = [
                    row for passage, text in zip(batch, texts, strict=True) for row in self._rows(passage, text, grounding, seen, tally)
                ]
                yield from made[:left]
        tally.finish(self.means.say, "take a larger generator, or lower minSupport")

    def _next(self, tally: Tally) -> int:
        """Passages to ask about at once: as many as are likely to be needed, by what came of those before."""
        left = self.spec.limit - tally.made
        each = max(tally.made / tally.texts, 0.1) if tally.texts else self.spec.per_passage
        return min(BATCH, max(math.ceil(left / each), LEAST if tally.texts else 1))

    def _asked(self, passage: Passage) -> Messages:
        values = {"passages": passage.shown, "count": str(self.spec.per_passage)}
        return ({"role": "user", "content": filled(self.spec.instruction, values)},)

    def _rows(self, passage: Passage, text: str, grounding: Grounding, seen: set[str], tally: Tally) -> Iterator[Row]:
        """The examples of one passage."""
        pairs = pairs_in(text)[: self.spec.per_passage]
        facts = [grounding.facts(passage.shown)]
        supported = [pair for pair in pairs if grounding.holds(pair.answer, facts)]
        new = list(_new(supported, seen))
        tally.add(found=True, written=len(pairs), kept=len(supported), made=len(new))
        for number, pair in enumerate(new, 1):
            yield self.shape.row(Place(passage.place, number, "question"), pair.question, pair.answer)


def _new(pairs: Sequence[Pair], seen: set[str]) -> Iterator[Pair]:
    """The pairs whose question was not asked before."""
    for pair in pairs:
        name = " ".join(terms(pair.question))
        if name and name not in seen:
            seen.add(name)
            yield pair


def _shuffled(passage: Passage) -> bytes:
    return hashlib.sha256(f"{passage.place}\0{passage.shown}".encode()).digest()
