"""What a teacher says of the training data, kept in the storage: the most probable tokens of every labelled position.

    <folder>/shard-00000/ids.npy                  int32 [L, k]
                         log_probabilities.npy    float16 [L, k + 1]: of these tokens, then of all others together
                         manifest.json            sha256 and size of both
             complete.json                        where each shard's examples begin and end, and the size of each file; written last

A shard holds the labelled positions of some consecutive examples of the train split, in their order. It is whole or not there, so what was
computed before an interruption is not computed again; the shards follow from the data alone, so any number of workers shares them out.
The folder's name is the digest of all that it follows from (`key`), so later epochs and later jobs find it. A shard that is lost or damaged
is computed again. The arrays are mapped into memory, never read whole: 6 k + 2 bytes for each label.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune_api.estimate import AUTO_TOKENS
from finetune_api.reasons import Reason
from finetune_trainer.data.batches import Row, micro_batches
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.shares import Limit
from finetune_trainer.data.tensors import MicroBatch, collate
from finetune_trainer.errors import JobError
from finetune_trainer.manifest import describe_files, digest_of, read_manifest, write_manifest
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives.distillation.head import logits_at
from finetune_trainer.objectives.distillation.response import Largest
from finetune_trainer.objectives.linear_score import chunks
from finetune_trainer.remedy import Remedy, Warn, Work
from finetune_trainer.storage import Storage, storage_errors
from finetune_trainer.worker import Worker

FORMAT = 1
COMPLETE = "complete.json"
SHARD_LABELS = 32_768
"""Most labels of a shard, unless one example has more."""
SHARDS = 64
"""Shards that there are at least, where the data allows it, so that many workers have their share."""
READING = Work(
    "the training data did not fit into memory beside the teacher: it reads {limit} at once now, and says the same",
    "a single example does not fit into the memory of a worker beside the teacher: lower training.maxSequenceLength, or name a smaller "
    "objective.distillation.teacher",
)
_ARRAYS = {"ids": np.int32, "log_probabilities": np.float16}
_SHARD = "shard-"

log = logging.getLogger(__name__)


def vocabulary_of(model: CausalModel) -> int:
    """Rows of a model's output layer: at least as many as its tokenizer has tokens."""
    return int(model.transformer.get_output_embeddings().weight.shape[0])


@dataclass(frozen=True)
class Kept:
    """Arrays of some labelled positions."""

    ids: npt.NDArray[np.int32]
    """[L, k]. Where there are fewer than k, one of them again."""
    log_probabilities: npt.NDArray[np.float16]
    """[L, k + 1]: of these tokens (-inf where there are fewer than k), then of all others together."""


@dataclass(frozen=True)
class Taking:
    """What is taken of a teacher's distribution."""

    k: int
    temperature: float
    vocabulary: int
    """Rows of the student's output layer: what the teacher's has beyond them is left out."""


def key(teacher: str, data: str, taking: Taking, precision: torch.dtype) -> str:
    """Name of the folder for a teacher, a digest of the data, and what else the numbers follow from.

    `teacher` says which teacher it is, and is what no other one can be made to say too. The temperature is among it since the mass of all
    others cannot be told from one temperature for another.
    """
    parts = {"format": FORMAT, "teacher": teacher, "data": data, "precision": str(precision), **asdict(taking)}
    return digest_of(parts).removeprefix("sha256:")[:32]


def is_complete(storage: Storage) -> bool:
    """Whether everything is there, each file with its size."""
    complete = _read_complete(storage)
    return complete is not None and complete["bytes"] == _sizes(storage)


def _read_complete(storage: Storage) -> dict[str, Any] | None:
    complete = storage.read_json(COMPLETE)
    return complete if isinstance(complete, dict) and {"shards", "bytes"} <= complete.keys() else None


def _sizes(storage: Storage) -> dict[str, int]:
    """Size of each array, as `<shard>/<file>`: one look at the storage, however many there are."""
    wanted = tuple(f"/{name}.npy" for name in _ARRAYS)
    with storage_errors(storage.uri):
        storage.fs.invalidate_cache()
        found = storage.fs.find(storage.root, detail=True) if storage.fs.exists(storage.root) else {}
    paths = {PurePosixPath(path): info for path, info in found.items() if path.endswith(wanted)}
    named = {f"{path.parent.name}/{path.name}": int(info["size"]) for path, info in paths.items()}
    return {name: size for name, size in named.items() if name.startswith(_SHARD)}


def shards_of(examples: Examples) -> list[tuple[int, int]]:
    """From and up to which example each shard goes."""
    counts = examples.label_counts()
    largest = max(1, min(SHARD_LABELS, -(-int(counts.sum()) // SHARDS)))
    bounds, held = [0], 0
    for index, count in enumerate(counts.tolist()):
        if held and held + count > largest:
            bounds.append(index)
            held = 0
        held += count
    return list(zip(bounds, [*bounds[1:], len(examples)], strict=True))


def shard_name(number: int) -> str:
    """Folder of a shard."""
    return f"{_SHARD}{number:05d}"


def write_shard(storage: Storage, number: int, kept: Kept) -> None:
    """Write a shard whole. Raises JobError (StorageFull, StorageUnavailable)."""
    with storage.shared_folder(shard_name(number)) as folder:
        for name, dtype in _ARRAYS.items():
            np.save(folder / f"{name}.npy", getattr(kept, name).astype(dtype, copy=False), allow_pickle=False)
        write_manifest(folder, {"format": FORMAT, "files": describe_files(folder)})


def write_complete(storage: Storage, shards: list[tuple[int, int]]) -> None:
    """Say that every shard is there."""
    storage.write_json(COMPLETE, {"format": FORMAT, "shards": shards, "bytes": _sizes(storage)})


class TeacherCache:
    """What is kept of a train split. Raises JobError (StorageUnavailable) where it cannot be read."""

    def __init__(self, storage: Storage, examples: Examples) -> None:
        self._rows = np.concatenate([[0], np.cumsum(examples.label_counts())])
        self._files = ExitStack()  # what is not on a file system is copied, and goes with this process
        complete = _read_complete(storage)
        if complete is None:
            raise JobError(Reason.STORAGE_UNAVAILABLE, f"{storage.uri} does not hold what the teacher said; the next attempt asks again")
        root = self._files.enter_context(storage.folder(""))
        try:
            self._starts = np.array([start for start, _ in complete["shards"]])
            self._shards = [
                Kept(*(np.load(root / shard_name(number) / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS))
                for number in range(len(self._starts))
            ]
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise JobError(Reason.STORAGE_UNAVAILABLE, f"{storage.uri}: what the teacher said cannot be read: {error}") from error

    def of(self, indices: tuple[int, ...], device: torch.device) -> Largest:
        """What the teacher says at the labels of these examples, one after the other."""
        spans = [self._span(index) for index in indices]
        ids = torch.from_numpy(np.concatenate([shard.ids[rows] for shard, rows in spans]).astype(np.int64))
        kept = torch.from_numpy(np.concatenate([shard.log_probabilities[rows] for shard, rows in spans]).astype(np.float32))
        # Rounded to float16 they do not quite sum to one any more.
        return Largest(ids.to(device, non_blocking=True), kept.to(device, non_blocking=True).log_softmax(dim=1))

    def _span(self, index: int) -> tuple[Kept, slice]:
        """The shard of an example, and its rows there."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        before = self._rows[self._starts[number]]
        return self._shards[number], slice(int(self._rows[index] - before), int(self._rows[index + 1] - before))


def fill(storage: Storage, teacher: CausalModel, examples: Examples, worker: Worker, taking: Taking, warn: Warn = log.warning) -> int:
    """Compute what is not kept yet, each worker its share of the shards. Every worker calls it. Returns how many this one computed.

    What does not fit into memory is read in halves, and `warn` is told. Raises JobError (GPUOutOfMemory) where one example does not fit.
    """
    remedy = Remedy(READING, teacher, Limit("auto", AUTO_TOKENS[teacher.device.type]), warn)
    shards = shards_of(examples)
    mine = [number for number in range(len(shards)) if number % worker.world == worker.rank]
    sizes, there = _sizes(storage), set(storage.folders())
    missing = [number for number in mine if not _is_whole(storage, shard_name(number), sizes)]
    for done, number in enumerate(missing):
        log.info("the teacher reads the training data: part %d of %d", done + 1, len(missing))
        if shard_name(number) in there:
            storage.remove(shard_name(number))  # what is left of it; one that another job has made meanwhile stays
        write_shard(storage, number, _computed(teacher, examples, shards[number], taking, remedy))
    remedy.settle(worker, worker.sum(float(remedy.mended)))  # once all have theirs
    if worker.leads:
        write_complete(storage, shards)
    worker.sum(0.0)
    return len(missing)


def _is_whole(storage: Storage, shard: str, sizes: Mapping[str, int]) -> bool:
    """Whether a shard's files have the sizes that they were written with."""
    manifest = read_manifest(storage, shard)
    return manifest is not None and all(sizes.get(f"{shard}/{name}") == file["bytes"] for name, file in manifest["files"].items())


@torch.no_grad()
def _computed(teacher: CausalModel, examples: Examples, shard: tuple[int, int], taking: Taking, remedy: Remedy) -> Kept:
    """One shard. Examples of about the same length are computed together, so that little is padding where a model needs it."""
    start, end = shard
    counts, lengths = examples.label_counts(), examples.lengths()
    rows = np.concatenate([[0], np.cumsum(counts[start:end])])
    k = min(taking.k, taking.vocabulary, vocabulary_of(teacher))
    kept = Kept(np.empty((int(rows[-1]), k), np.int32), np.empty((int(rows[-1]), k + 1), np.float16))
    order = sorted(range(start, end), key=lambda index: (int(lengths[index]), index))
    padded = teacher.layout == "padded"

    def taken(group: Sequence[Row]) -> int:
        return remedy.limit.taken(group, lengths, padded=padded)

    def asked(group: Sequence[Row]) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor]:
        batch = collate(examples, group, teacher.layout)
        return (batch.indices, *_largest(teacher, batch.to(teacher.device), taking))

    groups = list(micro_batches([(index,) for index in order], lengths, "auto", remedy.limit.tokens, padded=padded))
    for _, (indices, ids, log_probabilities) in remedy.each(groups, taken, asked):
        places = np.concatenate([np.arange(rows[index - start], rows[index - start + 1]) for index in indices])
        if bool(log_probabilities.isnan().any()):  # kept, it would spoil every later job too
            raise JobError(
                Reason.MODEL_INVALID,
                "objective.distillation.teacher: its probabilities are no numbers (NaN): its weights are damaged, or too large for "
                f"training.precision {str(teacher.precision).removeprefix('torch.')}",
            )
        kept.ids[places], kept.log_probabilities[places] = ids.int().cpu().numpy(), log_probabilities.half().cpu().numpy()
    return kept


def _largest(teacher: CausalModel, batch: MicroBatch, taking: Taking) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens at the labels, [L, k], and the logarithms of their probabilities and of all others', [L, k + 1]."""
    logits = logits_at(teacher, teacher.run(batch, logits=not teacher.plain_head), batch.label_positions)
    ids, values = [], []
    for part in chunks(batch.labels, taking.vocabulary, teacher.device) or [slice(0)]:
        log_p = (logits(part)[:, : taking.vocabulary] / taking.temperature).log_softmax(dim=1)
        largest = log_p.topk(min(taking.k, log_p.shape[1]), dim=1)
        others = log_p.scatter(1, largest.indices, -torch.inf).logsumexp(dim=1, keepdim=True)
        ids.append(largest.indices)
        values.append(torch.cat([largest.values, others], dim=1))
    return torch.cat(ids), torch.cat(values)
