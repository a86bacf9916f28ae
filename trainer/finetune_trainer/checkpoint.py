"""Checkpoints: complete and proven, or ignored.

    step-00000200/model.safetensors       what is trained
                  optimizer.safetensors   the optimiser's moments, `<parameter>/<moment>`
                  manifest.json           step, counts, the configuration, and sha256 and size of each file; written last

Where the workers hold parts of the model each writes its own, `model-00001-of-00002.safetensors` and so on: of each tensor the rows that
it holds. Whatever was written by so many workers is read by any other number.

The newest complete checkpoint is gone on from. A damaged one is set aside as `damaged-step-...` and the one before is taken. An old one
is removed only when a newer one is complete. Nothing is pickled.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.manifest import damage, describe_files, read_manifest, write_manifest
from finetune_trainer.model import CausalModel
from finetune_trainer.optimisation import restore_parameters
from finetune_trainer.parts import is_sharded, local_part
from finetune_trainer.saved_tensors import SavedTensor, open_tensors
from finetune_trainer.stopping import Validations
from finetune_trainer.storage import MANIFEST, Storage
from finetune_trainer.worker import Worker

FORMAT = 1
MODEL, OPTIMIZER = "model", "optimizer"
OBJECTIVE = "objective."
"""Beginning of the names of what an objective trains beside the model."""
_NAME = re.compile(r"step-(\d{8})")
_DAMAGED = "damaged-"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingState:
    """Everything that a training goes on from. Order of data and randomness follow from (seed, step), so the step says where they are."""

    step: int
    """Optimiser steps done."""
    trained_tokens: int
    """Tokens of examples that they were taken on."""
    parameters: Tensors
    """What is trained, by the parameter's name."""
    moments: Tensors
    """The optimiser's state, as `<parameter>/<moment>`."""
    validations: Validations = field(default_factory=Validations)

    @property
    def sharded(self) -> bool:
        """Whether each worker holds a part."""
        return any(is_sharded(tensor) for tensor in self.parameters.values())

    @property
    def bytes(self) -> int:
        """Size of the tensors, over all workers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.parameters.values(), *self.moments.values()))


@dataclass(frozen=True)
class SavedState:
    """A checkpoint that is complete. Its tensors are read one by one, when they are asked for."""

    step: int
    trained_tokens: int
    validations: Validations
    files: tuple[str, ...]
    """Names of its files of tensors."""

    @property
    def name(self) -> str:
        """Its folder's name."""
        return name_of(self.step)


def name_of(step: int) -> str:
    """The folder's name of a step's checkpoint."""
    return f"step-{step:08d}"


def save(storage: Storage, state: TrainingState, config: Mapping[str, Any], *, keep: int, worker: Worker | None = None) -> str:
    """Write a checkpoint whole, then remove all but the newest `keep` and the best. Returns its URI.

    A sharded state is written by all workers together, any other by the one that leads alone. Raises JobError (StorageFull,
    StorageUnavailable; WorkersLost where another worker could not write); the older checkpoints are all there then.
    """
    name = name_of(state.step)
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "trainedTokens": state.trained_tokens,
        "validations": state.validations.to_json(),
        "config": dict(config),
    }
    worker = worker or Worker()
    if state.sharded:
        _save_together(storage, state, manifest, worker)
    else:
        with storage.new_folder(name) as folder:
            save_file(_on_cpu(state.parameters), folder / f"{MODEL}.safetensors")
            save_file(_on_cpu(state.moments), folder / f"{OPTIMIZER}.safetensors")
            write_manifest(folder, {**manifest, "files": describe_files(folder)})
    if worker.leads:
        best = state.validations.best_step
        _remove_old(storage, name, keep=keep - 1, spared=None if best is None else name_of(best))
    return storage.locate(name)


def _save_together(storage: Storage, state: TrainingState, manifest: Mapping[str, Any], worker: Worker) -> None:
    """Every worker writes its part; when all are there, the one that leads completes the checkpoint.

    The folder that is being made has a name of its own: a worker that was given up but lives on writes into another.
    """
    token = worker.agree(secrets.randbits(48))
    making = storage.making(name_of(state.step), f"{token:012x}")
    with _all_or_none(worker):
        if worker.leads:
            making.begin()
    suffix = f"{worker.rank + 1:05d}-of-{worker.world:05d}"
    own = {f"{MODEL}-{suffix}.safetensors": state.parameters, f"{OPTIMIZER}-{suffix}.safetensors": state.moments}
    with _all_or_none(worker), making.part() as folder:
        for name, tensors in own.items():
            save_file(_own(tensors, worker), folder / name)
        (folder / f"part-{suffix}.json").write_text(json.dumps(describe_files(folder, own)), encoding="utf-8")
    with _all_or_none(worker):
        if worker.leads:
            every: dict[str, Any] = {}
            for rank in range(worker.world):
                every |= making.read_json(f"part-{rank + 1:05d}-of-{worker.world:05d}.json")
            making.complete(lambda folder: write_manifest(folder, {**manifest, "files": every}))


@contextmanager
def _all_or_none(worker: Worker) -> Iterator[None]:
    """What every worker must have done before any goes on. Raises its own error, or JobError (WorkersLost) for another's."""
    try:
        yield
    except Exception:
        worker.sum(1.0)
        raise
    if worker.sum(0.0):
        raise JobError(Reason.WORKERS_LOST, "another worker could not write its part of the checkpoint")


def _own(tensors: Tensors, worker: Worker) -> Tensors:
    """What this worker writes: its rows of sharded tensors; the one that leads, all others too."""
    own = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor) or worker.leads}
    parts = {name: local_part(tensor) for name, tensor in own.items()}
    return _on_cpu({name: part for name, part in parts.items() if part.numel() or not is_sharded(own[name])})


def _remove_old(storage: Storage, newer: str, *, keep: int, spared: str | None) -> None:
    """Remove all checkpoints before `newer` but the last `keep` that are complete, and the one that is spared.

    One after it is left alone: training went on from before it, so it is incomplete or damaged and must not take a good one's place.
    """
    for name in _names(storage):
        if name >= newer:
            continue
        complete = storage.exists(f"{name}/{MANIFEST}")
        if keep > 0 and complete:
            keep -= 1
        elif name != spared or not complete:
            storage.remove(name)


def newest(storage: Storage, config: Mapping[str, Any]) -> tuple[SavedState | None, tuple[str, ...]]:
    """The newest complete checkpoint, or None; and the names of those that were found damaged and set aside.

    Raises JobError (CheckpointIncompatible) listing what differs, where it was made under another configuration.
    """
    damaged: list[str] = []
    for name in _names(storage):
        state = _described(storage, name, config)
        if state is not None and _is_whole(storage, state):
            return state, tuple(damaged)
        storage.set_aside(name, f"{_DAMAGED}{name}")
        damaged.append(name)
    return None, tuple(damaged)


def steps_of(storage: Storage) -> list[int]:
    """The steps of the checkpoints that are there, the latest first."""
    return [int(name.removeprefix("step-")) for name in _names(storage)]


def find(storage: Storage, step: int, config: Mapping[str, Any], *, proven: bool = False) -> SavedState:
    """The checkpoint of a step; with `proven` it is known to be whole. Raises JobError (CheckpointCorrupted) where there is none."""
    state = _described(storage, name_of(step), config)
    if state is None or not (proven or _is_whole(storage, state)):
        raise JobError(Reason.CHECKPOINT_CORRUPTED, f"{storage.locate(name_of(step))} cannot be read")
    return state


@contextmanager
def opened(storage: Storage, state: SavedState) -> Iterator[tuple[dict[str, SavedTensor], dict[str, SavedTensor]]]:
    """A checkpoint's parameters and moments, to be read one by one."""
    with ExitStack() as stack:
        folder = stack.enter_context(storage.folder(state.name))
        yield (
            stack.enter_context(open_tensors(_files(folder, state, MODEL))),
            stack.enter_context(open_tensors(_files(folder, state, OPTIMIZER))),
        )


def restore_model(model: CausalModel, storage: Storage, step: int, config: Mapping[str, Any], worker: Worker) -> None:
    """Put a checkpoint's weights into a model. The worker that leads proves it; each reads only what it holds.

    Raises JobError (CheckpointCorrupted, CheckpointIncompatible).
    """
    state = find(storage, step, config) if worker.leads else None
    worker.sum(0.0)
    state = state or find(storage, step, config, proven=True)
    model.settle()
    own = [(name, parameter) for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    with opened(storage, state) as (parameters, _):
        restore_parameters(own, {name: tensor for name, tensor in parameters.items() if not name.startswith(OBJECTIVE)})


def remove_damaged(storage: Storage) -> None:
    """Remove what was set aside. Raises JobError (StorageUnavailable)."""
    for name in storage.folders():
        if name.startswith(_DAMAGED) or (_NAME.fullmatch(name) and not storage.exists(f"{name}/{MANIFEST}")):
            storage.remove(name)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What two configurations do not share, as `path: before, now after`."""
    old, new = dict(_flat(before)), dict(_flat(now))
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            yield f"{path} was {old.get(path)!r}, now {new.get(path)!r}"


def _names(storage: Storage) -> list[str]:
    """The checkpoints' names, the newest first."""
    return sorted((name for name in storage.folders() if _NAME.fullmatch(name)), reverse=True)


def _described(storage: Storage, name: str, config: Mapping[str, Any]) -> SavedState | None:
    """The checkpoint as its manifest has it, or None where it has none that is whole."""
    manifest = read_manifest(storage, name)
    if manifest is None or manifest["format"] != FORMAT:
        return None
    if changed := list(differences(manifest["config"], config)):
        raise JobError(Reason.CHECKPOINT_INCOMPATIBLE, f"{storage.locate(name)} was made otherwise: {'; '.join(changed[:5])}")
    validations = Validations.from_json(manifest.get("validations"))
    return SavedState(manifest["step"], manifest["trainedTokens"], validations, tuple(sorted(manifest["files"])))


def _is_whole(storage: Storage, state: SavedState) -> bool:
    """Whether its files are as they were written."""
    manifest = read_manifest(storage, state.name)
    with storage.folder(state.name) as folder:
        if manifest is None or damage(folder, manifest) is not None:
            return False
        try:
            with open_tensors(_files(folder, state, MODEL)), open_tensors(_files(folder, state, OPTIMIZER)):
                return True
        except SafetensorError:
            return False


def _files(folder: Path, state: SavedState, what: str) -> list[Path]:
    return [folder / name for name in state.files if name.startswith(what)]


def _on_cpu(tensors: Tensors) -> Tensors:
    """The tensors as safetensors wants them."""
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
