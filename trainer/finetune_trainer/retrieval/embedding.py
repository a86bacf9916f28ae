"""Texts found by what they mean: those whose vectors are nearest to the query's. Every vector is looked at; nothing is approximate.

    .finetune/cache/vectors/<key>/<part>/    vectors.npy, float32 [PART, H], and manifest.json, in output.storage

The key covers the encoder, where it is, and all texts, so that a retry, and another job with the same knowledge base, does not embed it
again; a killed process loses one part at most. Keys that no job has begun with for long are removed (see data_cache.mark_used).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from finetune_trainer.data_cache import mark_used
from finetune_trainer.manifest import digest_of
from finetune_trainer.retrieval.search import Hit, best
from finetune_trainer.storage import MANIFEST, Storage

FOLDER = ".finetune/cache/vectors"
FORMAT = 1
PART = 2048
"""Texts whose vectors are written together."""
_QUERIES = 256
_BLOCK = 1 << 16
"""Vectors that as many queries are compared with at a time: 64 MiB of products."""
_FILE = "vectors.npy"

Vectors = npt.NDArray[np.float32]
Say = Callable[[str], None]


class Embedder(Protocol):
    """What makes vectors: encoder.Encoder."""

    @property
    def identity(self) -> str:
        """What a vector follows from, but for its text."""
        ...

    def embed(self, texts: Sequence[str], purpose: Literal["query", "document"] | None = None) -> Vectors:
        """[N, H] rows of length one."""
        ...


class MeaningIndex:
    """An index of vectors."""

    def __init__(self, embedder: Embedder, vectors: Vectors) -> None:
        """`vectors` are the texts' own: [N, H] rows of length one."""
        self._embedder, self._vectors = embedder, vectors

    def search(self, queries: Sequence[str], most: int) -> list[tuple[Hit, ...]]:
        """See search.Index; the score is the cosine."""
        found: list[tuple[Hit, ...]] = []
        for start in range(0, len(queries), _QUERIES):
            found += self._nearest(self._embedder.embed(queries[start : start + _QUERIES], "query"), most)
        return found

    def _nearest(self, wanted: Vectors, most: int) -> Iterator[tuple[Hit, ...]]:
        """The nearest to each of [Q, H], block after block of the texts."""
        scores: list[Vectors] = [np.empty(0, np.float32)] * len(wanted)
        places: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)] * len(wanted)
        for start in range(0, len(self._vectors), _BLOCK):
            products = wanted @ self._vectors[start : start + _BLOCK].T
            for row, product in enumerate(products):
                hits = best(product, most)
                scores[row] = np.append(scores[row], np.array([hit.score for hit in hits], np.float32))
                places[row] = np.append(places[row], np.array([start + hit.number for hit in hits], np.int64))
        for score, place in zip(scores, places, strict=True):
            yield tuple(Hit(int(place[hit.number]), hit.score) for hit in best(score, most))


def vectors_of(texts: Sequence[str], embedder: Embedder, where: str, storage: Storage | None, say: Say) -> Vectors:
    """The texts' vectors, [N, H]: from output.storage, else computed and put there.

    `where` tells the encoder's place: who can write there is to deceive nobody who loads from elsewhere. Raises JobError (StorageFull,
    StorageUnavailable).
    """
    if storage is None:
        return embedder.embed(texts, "document")
    texts_digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
    follows = {"format": FORMAT, "encoder": embedder.identity, "where": where, "texts": texts_digest}
    key = f"{FOLDER}/{digest_of(follows)[7:39]}"
    mark_used(storage, key)
    parts = []
    for number, start in enumerate(range(0, len(texts), PART)):
        name, some = f"{key}/{number:06d}", texts[start : start + PART]
        kept = _read(storage, name, len(some))
        if kept is None:
            kept = embedder.embed(some, "document")
            _write(storage, name, kept)
            say(f"{start + len(some):,} of {len(texts):,} passages are embedded")
        parts.append(kept)
    return np.concatenate(parts)


def _read(storage: Storage, name: str, rows: int) -> Vectors | None:
    """Vectors that are kept; None where they are not, or are damaged, and are then removed."""
    manifest = storage.read_json(f"{name}/{MANIFEST}")
    if manifest is None:
        return None
    with storage.folder(name) as folder:
        try:
            content = (folder / _FILE).read_bytes()
            vectors: Vectors = np.load(folder / _FILE, allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            content, vectors = b"", np.empty(0, np.float32)
    is_whole = isinstance(manifest, dict) and manifest.get("sha256") == hashlib.sha256(content).hexdigest()
    if is_whole and vectors.ndim == 2 and len(vectors) == rows and vectors.dtype == np.float32:
        return vectors
    storage.remove(name)
    return None


def _write(storage: Storage, name: str, vectors: Vectors) -> None:
    with storage.shared_folder(name) as folder:
        np.save(folder / _FILE, vectors, allow_pickle=False)
        content = (folder / _FILE).read_bytes()
        (folder / MANIFEST).write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}), encoding="utf-8")
