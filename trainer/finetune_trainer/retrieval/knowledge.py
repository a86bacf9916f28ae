"""A knowledge base of a job: its documents, cut into passages and indexed as the retriever says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune_api.preparation import KnowledgeBase, Retriever
from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.retrieval.bm25 import WordIndex
from finetune_trainer.retrieval.documents import KnowledgeFiles
from finetune_trainer.retrieval.embedding import Embedder, MeaningIndex, vectors_of
from finetune_trainer.retrieval.hybrid import HybridIndex
from finetune_trainer.retrieval.passages import Passage, passages_of
from finetune_trainer.retrieval.search import Index
from finetune_trainer.sources import Mounts, resolve_data
from finetune_trainer.storage import Storage

Say = Callable[[str], None]


@dataclass(frozen=True)
class Knowledge:
    """Passages that can be searched."""

    passages: tuple[Passage, ...]
    index: Index

    def retrieve(self, queries: Sequence[str], most: int) -> list[tuple[Passage, ...]]:
        """For each query, so many passages at most, the best first; none where no passage has anything of it."""
        return [tuple(self.passages[hit.number] for hit in hits) for hits in self.index.search(queries, most)]


def files_of(knowledge_base: KnowledgeBase, mounts: Mounts, field: str) -> KnowledgeFiles:
    """Where the documents are. `field` is the knowledge base's in the spec, for messages. Raises JobError as resolve_data does."""
    return KnowledgeFiles(resolve_data(knowledge_base.data_source(), mounts), field)


def check_knowledge(knowledge_base: KnowledgeBase, files: KnowledgeFiles) -> None:
    """Find out whether there is anything to look up, before anybody is paid or asked; no more than the first passage is read.

    Raises JobError as read_passages does.
    """
    if next(iter(passages_of(files.documents(), knowledge_base.passage_words, knowledge_base.overlap_words)), None) is None:
        raise _without_words(files)


def read_passages(knowledge_base: KnowledgeBase, files: KnowledgeFiles, say: Say) -> tuple[Passage, ...]:
    """All passages, in the order of the documents. Raises JobError (KnowledgeBaseInvalid, AuthenticationFailed, StorageUnavailable)."""
    places: set[str] = set()
    found = []
    for passage in passages_of(files.documents(), knowledge_base.passage_words, knowledge_base.overlap_words):
        places.add(passage.place)
        found.append(passage)
    if not found:
        raise _without_words(files)
    others = files.files()[1]
    left = f"; {_counted(others, 'file')} of other forms left out" if others else ""
    say(f"{files.field}: {_counted(len(found), 'passage')} of {_counted(len(places), 'document')}{left}")
    return tuple(found)


def _without_words(files: KnowledgeFiles) -> JobError:
    return JobError(Reason.KNOWLEDGE_BASE_INVALID, f"{files.field}: {files.location.uri} holds no words: no document has a letter")


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def open_knowledge(
    passages: tuple[Passage, ...],
    retriever: Retriever,
    load: Callable[[], Embedder],
    storage: Storage | None,
    say: Say,
    namespace: str = "",
) -> Knowledge:
    """The passages, indexed. `load` loads the retriever's encoder, where it has one; `storage` is output.storage, which keeps vectors.

    `namespace` is the job's, whose claims are its own. Raises JobError: what `load` raises, and StorageFull, StorageUnavailable.
    """
    shown = [passage.shown for passage in passages]
    if retriever.kind == "bm25":
        return Knowledge(passages, WordIndex(shown))
    embedder = load()
    where = f"{namespace} {retriever.encoder.model_dump_json(by_alias=True) if retriever.encoder else ''}"
    meaning = MeaningIndex(embedder, vectors_of(shown, embedder, where, storage, say))
    return Knowledge(passages, meaning if retriever.kind == "embedding" else HybridIndex([WordIndex(shown), meaning]))
