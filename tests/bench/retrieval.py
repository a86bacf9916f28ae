"""Retrieval: recall on the labelled set of the repository, and how fast passages are read, indexed, embedded and searched.

Recall at k is the share of a question's relevant passages that are among the first k, averaged over the questions. By meaning it depends on
the encoder, of which none lies here: name a folder of one by --encoder. Speed is measured with a BERT of random weights and MiniLM's shape
where none is named.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

SET = Path(__file__).parents[1] / "data" / "retrieval"
DEPTHS = (1, 5)
COPIES = 5
"""Times that the set's passages are taken to measure speed."""
WORDS, OVERLAP = 120, 20
VOCABULARY = 30522


@dataclass(frozen=True)
class Labelled:
    """A question and the passages that answer it, by name."""

    question: str
    relevant: frozenset[str]


def compare(folder: Path, encoder: Path | None = None) -> Table:
    """Recall and speed of each kind of retriever."""
    from finetune_trainer.retrieval.bm25 import WordIndex
    from finetune_trainer.retrieval.embedding import MeaningIndex
    from finetune_trainer.retrieval.hybrid import HybridIndex

    passages, labelled = read_set()
    texts = [passage.shown for passage in passages]
    embedder = _encoder(encoder or _random_encoder(folder / "encoder"))
    words, meaning = WordIndex(texts), MeaningIndex(embedder, embedder.embed(texts, "document"))
    found = {"bm25": words, "embedding": meaning, "hybrid": HybridIndex([words, meaning])}
    many = [f"{text} {number}" for number in range(COPIES) for text in texts]
    print(f"retrieval: {len(many):,} passages to index and to embed", flush=True)
    seconds = {"bm25": _seconds(lambda: WordIndex(many)), "embedding": _seconds(lambda: embedder.embed(many, "document"))}
    questions = [each.question for each in labelled]
    title = (
        f"Retrieval: {len(labelled)} questions, {len(passages)} passages, {os.cpu_count()} cores, encoder {encoder or 'of random weights'}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("retriever", *(f"recall at {depth}" for depth in DEPTHS), "passages/s indexed", "questions/s"):
        table.add_column(column, justify="left" if column == "retriever" else "right")
    for kind, index in found.items():
        tells = kind == "bm25" or encoder is not None  # random weights tell nothing of an encoder
        recalls = [f"{recall(index, passages, labelled, depth):.3f}" if tells else "" for depth in DEPTHS]
        rate = f"{len(many) / seconds[kind]:,.0f}" if kind in seconds else ""
        asked = _seconds(lambda index=index: index.search(questions, DEPTHS[-1]))  # type: ignore[misc]
        table.add_row(kind, *recalls, rate, f"{len(questions) / asked:,.0f}")
    return table


def read_set() -> tuple[tuple[Any, ...], tuple[Labelled, ...]]:
    """The passages of the labelled set, and its questions."""
    from finetune_trainer.retrieval.documents import KnowledgeFiles
    from finetune_trainer.retrieval.passages import passages_of

    documents = KnowledgeFiles(_location(SET / "kb"), "retrieval").documents()
    lines = (SET / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    labelled = tuple(Labelled(row["question"], frozenset(row["relevant"])) for row in map(json.loads, lines))
    return tuple(passages_of(documents, WORDS, OVERLAP)), labelled


def name_of(passage: Any) -> str:
    """A passage as the labels name it: the file without its line, and the headings."""
    return f"{passage.place.partition(', ')[0].removeprefix('kb/')}#{passage.title}"


def recall(index: Any, passages: Sequence[Any], labelled: Sequence[Labelled], depth: int) -> float:
    """The share of relevant passages among the first `depth`, averaged over the questions."""
    hits = index.search([each.question for each in labelled], depth)
    names = [{name_of(passages[hit.number]) for hit in each} for each in hits]
    return sum(len(found & each.relevant) / len(each.relevant) for found, each in zip(names, labelled, strict=True)) / len(labelled)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _location(path: Path) -> Any:
    from fsspec.implementations.local import LocalFileSystem

    from finetune_trainer.sources import Location

    return Location(LocalFileSystem(), str(path), path.name)


def _encoder(folder: Path) -> Any:
    from finetune_api.fields import LOCAL_RUN
    from finetune_api.v1alpha1 import ModelSource
    from finetune_trainer.encoder import load_encoder
    from finetune_trainer.sources import Mounts

    source = ModelSource.model_validate({"source": f"file://{folder}"}, context=LOCAL_RUN)
    return load_encoder(source, Mounts(folder, local=True), folder / "cache", "--encoder")


def _random_encoder(folder: Path) -> Path:
    """A BERT of MiniLM's shape (6 layers of width 384, 22 million weights), whose tokenizer knows the set's words and pieces of others."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", *dict.fromkeys(_pieces())][:VOCABULARY]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def _pieces() -> Iterator[str]:
    characters = sorted({character for path in (SET / "kb").iterdir() for character in path.read_text(encoding="utf-8")})
    yield from characters
    yield from (f"##{character}" for character in characters)
    for path in sorted((SET / "kb").iterdir()):
        yield from path.read_text(encoding="utf-8").split()
