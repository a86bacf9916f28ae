"""Content points: for each golden output, what it says, as the passages of a knowledge base support it, becomes the prompt for it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from finetune_api.preparation import ContentPoints
from finetune_trainer.completions import Messages
from finetune_trainer.data.inputs import Input
from finetune_trainer.data.rows import Fault, Place, Row, columns_of, kind_of
from finetune_trainer.made_data.made import Means, Shape, Tally
from finetune_trainer.made_data.texts import filled, numbered, points_in
from finetune_trainer.made_data.writer import BATCH, Desk, Writer
from finetune_trainer.retrieval import Knowledge, Passage, open_knowledge, read_passages
from finetune_trainer.retrieval.documents import KnowledgeFiles
from finetune_trainer.retrieval.embedding import Embedder
from finetune_trainer.retrieval.grounding import Grounding
from finetune_trainer.retrieval.words import language_of

FIELD = "data.preparation.contentPoints"


@dataclass(frozen=True)
class Golden:
    """A golden output."""

    place: Place
    output: str
    prompt: str
    """The request that it answers; empty where the data does not say."""
    group: object
    """What it has in data.groupBy."""


@dataclass(frozen=True)
class Told:
    """A golden output with the passages that were found for it, and the points that the generator wrote."""

    golden: Golden
    passages: tuple[Passage, ...]
    points: tuple[str, ...] = ()
    written: bool = False
    """Whether the generator wrote anything."""


@dataclass(frozen=True)
class PointRows:
    """Rows that are made of golden outputs: an Input."""

    spec: ContentPoints
    golden: Input
    files: KnowledgeFiles
    writer: Writer
    shape: Shape
    means: Means

    def identity(self) -> list[str]:
        """What the rows follow from: the settings, the golden outputs, the documents and the generator."""
        settings = self.spec.model_dump(mode="json", by_alias=True)
        follows = [FIELD, settings, dict(self.writer.identity), self.shape.identity(), self.means.namespace]
        return [json.dumps(follows, sort_keys=True), *self.golden.identity(), *self.files.identity()]

    def state(self) -> list[str]:
        """What shows that the golden outputs or the documents have changed."""
        return [*self.golden.state(), *self.files.state()]

    def rows(self) -> Iterator[Row | Fault]:
        """A row for each golden output that has a point which a passage supports, and in the place of each other one why it has none.

        Raises JobError (KnowledgeBaseInvalid, GeneratorUnavailable, DatasetInvalid, ...).
        """
        knowledge = self._knowledge()
        grounding = Grounding(language_of([passage.shown for passage in knowledge.passages]), self.spec.min_support)
        tally = Tally(FIELD, "golden output", "point")
        with Desk(self.writer, self.spec.max_new_tokens, self.means.storage, f"{FIELD}.generator", self.means.say) as desk:
            golden = self.golden.rows()
            while rows := list(islice(golden, BATCH)):
                read = [self._golden(row) if isinstance(row, Row) else row for row in rows]
                told = iter(self._told([item for item in read if isinstance(item, Golden)], knowledge, desk))
                for item in read:
                    yield item if isinstance(item, Fault) else self._row(next(told), grounding, tally)
        tally.finish(self.means.say, "check that the knowledge base holds what the outputs say, or lower minSupport")

    def _knowledge(self) -> Knowledge:
        retriever, base = self.spec.retriever, self.spec.knowledge_base
        encoder, field = retriever.encoder, f"{FIELD}.retriever.encoder"
        passages = read_passages(base, self.files, self.means.say)

        def load() -> Embedder:
            assert encoder is not None  # noqa: S101 - the spec's own rule
            return self.means.encoder_of(encoder, field)

        return open_knowledge(passages, retriever, load, self.means.storage, self.means.say, self.means.namespace)

    def _golden(self, row: Row) -> Golden | Fault:
        """The golden output of a row, or what is wrong with it."""
        columns = {"column": self.spec.golden_outputs.column, "promptColumn": self.spec.golden_outputs.prompt_column}
        texts = {}
        for field, name in columns.items():
            if name is None:
                continue
            if name not in row.columns:
                missing = f"the column {name} ({FIELD}.goldenOutputs.{field}) is missing"
                return Fault(row.place, f"{missing}; the row has {columns_of(row)}")
            value = row.columns[name]
            if not isinstance(value, str):
                return Fault(row.place, f"{name} must be a string, not {kind_of(value)}")
            if not value.strip():
                return Fault(row.place, f"{name} is empty")
            texts[field] = value
        group = row.columns.get(self.shape.group_by) if self.shape.group_by is not None else None
        return Golden(row.place, texts["column"], texts.get("promptColumn", ""), group)

    def _told(self, golden: Sequence[Golden], knowledge: Knowledge, desk: Desk) -> list[Told]:
        """What the generator makes of outputs; those for which no passage was found are not asked for."""
        queries = [f"{each.prompt}\n{each.output}".strip() for each in golden]
        found = knowledge.retrieve(queries, self.spec.retriever.passages)
        told = [Told(each, passages) for each, passages in zip(golden, found, strict=True)]
        texts = iter(desk.write([self._asked(each) for each in told if each.passages]))
        return [_read(each, next(texts)) if each.passages else each for each in told]

    def _asked(self, told: Told) -> Messages:
        """What the generator is told."""
        values = {"passages": numbered(told.passages), "output": told.golden.output, "prompt": told.golden.prompt}
        return ({"role": "user", "content": filled(self.spec.instruction, values)},)

    def _row(self, told: Told, grounding: Grounding, tally: Tally) -> Row | Fault:
        """The example; where no point is supported, why there is none."""
        facts = [grounding.facts(passage.shown) for passage in told.passages]
        points = [point for point in told.points if grounding.holds(point, facts)]
        tally.add(found=bool(told.passages), written=len(told.points), kept=len(points), made=bool(points))
        if not points:
            return Fault(told.golden.place, self._why_none(told), counts=False)
        values = {"points": "\n".join(f"- {point}" for point in points), "prompt": told.golden.prompt}
        return self.shape.row(told.golden.place, filled(self.spec.prompt, values), told.golden.output, told.golden.group)

    def _why_none(self, told: Told) -> str:
        """Why no example came of a golden output."""
        if not told.passages:
            return "no passage of the knowledge base has a word in common with the output"
        if not told.written:
            (message,) = self._asked(told)
            length = f"what it was told has {len(message['content']):,} characters"
            return f"the generator wrote nothing: {length}, with {len(told.passages)} passages, which may leave no room for an answer"
        if not told.points:
            return "the generator listed no points, one a line"
        return f"no passage supports any of the {len(told.points)} points that the generator wrote"


def _read(told: Told, text: str) -> Told:
    """With what the generator wrote."""
    return replace(told, points=tuple(points_in(text)), written=bool(text.strip()))
