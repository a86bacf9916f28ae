"""How probable the model that the training begins from finds every example: what preference learning measures the change from.

Computed once, before the first step, by the model that will be trained: there is never a second one in memory. Kept in the job's own
folder of the storage, so that a run that was interrupted goes on with the same numbers.

    references/<split>.npy    float64, one for each example of the split
    references/manifest.json  the digest of the data that they are of, and sha256 of each file; written last
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from finetune_trainer.data.examples import Examples
from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives.log_probabilities import example_log_probabilities
from finetune_trainer.objectives.objective import Context
from finetune_trainer.objectives.sweep import sweep
from finetune_trainer.soft_prompts import prompt_type
from finetune_trainer.storage import MANIFEST, Storage

FOLDER = "references"
References = Mapping[str, torch.Tensor]
"""The log-probability of the labels of each example, by split: float64 [N] on the CPU."""


def references_of(context: Context) -> References:
    """The references of every split: those that are kept, else computed, each worker its share. Every worker calls it."""
    worker, splits = context.worker, context.data.splits()
    known = _read(context.storage, context.data.digest, splits) if worker.leads else None
    is_known = bool(worker.agree(int(known is not None)))
    found: dict[str, torch.Tensor] = {}
    for split, examples in splits.items():
        own = torch.zeros(len(examples) + 1, dtype=torch.float64, device=worker.device)
        if not is_known:
            _fill(own[:-1], split, examples, context)
            own[-1] = context.remedy.mended
        elif known is not None:
            own[:-1] = known[split]
        worker.all_reduce(own)  # of each number one worker has it and the others have 0
        found[split] = own[:-1].cpu()
        context.remedy.settle(worker, float(own[-1]))
    if worker.leads and not is_known:
        _write(context.storage, context.data.digest, found)
    return found


@contextmanager
def starting_point(model: CausalModel) -> Iterator[CausalModel]:
    """The model that a training begins from, before its first step, in evaluation mode.

    Every method leaves the base model's outputs as they were when it is applied but soft prompts, which stand before each example at once:
    without them it is the base model.
    """
    was_training = model.module.training
    model.module.eval()
    try:
        if prompt_type(model.module) is None:
            yield model
        else:
            with model.untuned() as base:
                yield base
    finally:
        model.module.train(was_training)
        model.settle()  # the loop will ask for its parameters


def _fill(found: torch.Tensor, split: str, examples: Examples, context: Context) -> None:
    """Compute this worker's share of a split's numbers, in the pieces that it is measured in too, for an untuned model gives just them."""
    with starting_point(context.model) as model:

        def see(batch: MicroBatch) -> tuple[tuple[int, ...], torch.Tensor]:
            return batch.indices, example_log_probabilities(model, batch)

        for indices, values in sweep(model, (split, examples), context.training, context.worker, context.remedy, see):
            found[list(indices)] = values


def _read(storage: Storage, data: str, splits: Mapping[str, Examples]) -> References | None:
    """What is kept for this data; None where there is nothing, or not all of it as it was written."""
    manifest = storage.read_json(f"{FOLDER}/{MANIFEST}")
    if not isinstance(manifest, dict) or manifest.get("data") != data:
        return None
    found: dict[str, torch.Tensor] = {}
    with storage.folder(FOLDER) as folder:
        for split, examples in splits.items():
            content = _content(folder / f"{split}.npy")
            if content is None or hashlib.sha256(content).hexdigest() != manifest.get("sha256", {}).get(split):
                return None
            values = np.load(io.BytesIO(content), allow_pickle=False)
            if values.shape != (len(examples),):
                return None
            found[split] = torch.from_numpy(values)
    return found


def _write(storage: Storage, data: str, found: References) -> None:
    digests = {}
    with storage.new_folder(FOLDER) as folder:
        for split, values in found.items():
            np.save(folder / f"{split}.npy", values.numpy(), allow_pickle=False)
            digests[split] = hashlib.sha256((folder / f"{split}.npy").read_bytes()).hexdigest()
        (folder / MANIFEST).write_text(json.dumps({"data": data, "sha256": digests}), encoding="utf-8")


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
