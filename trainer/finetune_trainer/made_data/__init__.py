"""Examples that are made of documents: content points with golden outputs, and questions with answers. They come as rows to the data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune_api.preparation import Generator as GeneratorSpec
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.data.inputs import Input, input_of
from finetune_trainer.data.rows import Fault, Row
from finetune_trainer.made_data import points, questions
from finetune_trainer.made_data.made import Means, shape_of
from finetune_trainer.made_data.writer import Generator, Writer
from finetune_trainer.retrieval import files_of

__all__ = ["Generator", "MadeRows", "Means", "Writer", "made_rows"]

WriterOf = Callable[[GeneratorSpec | None, str], Writer]
"""The generator of a part of the spec, None for the job's base model; the second is its field, for messages."""


@dataclass(frozen=True)
class MadeRows:
    """The rows of several inputs, one after the other: an Input."""

    inputs: tuple[Input, ...]

    def rows(self) -> Iterator[Row | Fault]:
        """All rows."""
        for each in self.inputs:
            yield from each.rows()

    def identity(self) -> list[str]:
        """What they follow from."""
        return [part for each in self.inputs for part in each.identity()]

    def state(self) -> list[str]:
        """What shows that something of it has changed."""
        return [part for each in self.inputs for part in each.state()]


def made_rows(job: FineTuneJob, means: Means, writer_of: WriterOf, *, is_chat: bool) -> MadeRows | None:
    """What the job makes of documents, as rows that it can read; None where it makes nothing. Nothing is read or loaded yet.

    `is_chat` says whether the job's model has a chat template. Raises JobError (InvalidSpec, and what resolving the sources raises).
    """
    preparation = job.spec.data.preparation
    if not preparation.makes_examples:
        return None
    shape, inputs = shape_of(job, is_chat=is_chat), list[Input]()
    if (spec := preparation.content_points) is not None:
        files = files_of(spec.knowledge_base, means.mounts, f"{points.FIELD}.knowledgeBase")
        golden = input_of(spec.golden_outputs, "train", means.mounts)
        inputs.append(points.PointRows(spec, golden, files, writer_of(spec.generator, f"{points.FIELD}.generator"), shape, means))
    if (asking := preparation.questions) is not None:
        files = files_of(asking.knowledge_base, means.mounts, f"{questions.FIELD}.knowledgeBase")
        writer = writer_of(asking.generator, f"{questions.FIELD}.generator")
        inputs.append(questions.QuestionRows(asking, files, writer, shape, means))
    return MadeRows(tuple(inputs))
