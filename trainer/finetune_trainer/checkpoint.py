"""Checkpoints: complete and proven, or ignored.

    step-00000200/model.safetensors       what is trained
                  optimizer.safetensors   the optimiser's moments, `<parameter>/<moment>`
                  manifest.json           step, counts, the configuration, and sha256 and size of each file; written last

The newest complete checkpoint is gone on from. A damaged one is set aside as `damaged-step-...` and the one before is taken. An old one
is removed only when a newer one is complete. Nothing is pickled.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.manifest import damage, describe_files, read_manifest, write_manifest
from finetune_trainer.storage import MANIFEST, Storage

FORMAT = 1
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
_NAME = re.compile(r"step-(\d{8})")
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


def name_of(step: int) -> str:
    """The folder's name of a step's checkpoint."""
    return f"step-{step:08d}"


def save(storage: Storage, state: TrainingState, config: Mapping[str, Any], *, keep: int) -> str:
    """Write a checkpoint whole, then remove all but the newest `keep`. Returns its URI.

    Raises JobError (StorageFull, StorageUnavailable); the older checkpoints are all there then.
    """
    name = name_of(state.step)
    with storage.new_folder(name) as folder:
        save_file(_on_cpu(state.parameters), folder / MODEL_FILE)
        save_file(_on_cpu(state.moments), folder / OPTIMIZER_FILE)
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "trainedTokens": state.trained_tokens,
            "config": dict(config),
            "files": describe_files(folder),
        }
        write_manifest(folder, manifest)
    _remove_old(storage, name, keep=keep - 1)
    return storage.locate(name)


def _remove_old(storage: Storage, newer: str, *, keep: int) -> None:
    """Remove all checkpoints before `newer` but the last `keep` that are complete.

    One after it is left alone: training went on from before it, so it is incomplete or damaged and must not take a good one's place.
    """
    for name in _names(storage):
        if name >= newer:
            continue
        if keep > 0 and storage.exists(f"{name}/{MANIFEST}"):
            keep -= 1
        else:
            storage.remove(name)


def newest(storage: Storage, config: Mapping[str, Any]) -> tuple[TrainingState | None, tuple[str, ...]]:
    """The newest complete checkpoint, on the CPU, or None; and the names of those that were found damaged and set aside.

    Raises JobError (CheckpointIncompatible) listing what differs, where it was made under another configuration.
    """
    damaged: list[str] = []
    for name in _names(storage):
        state = _read(storage, name, config)
        if state is not None:
            return state, tuple(damaged)
        storage.set_aside(name, f"damaged-{name}")
        damaged.append(name)
    return None, tuple(damaged)


def load(storage: Storage, step: int, config: Mapping[str, Any]) -> TrainingState:
    """The checkpoint of a step that is known to be complete. Raises JobError (CheckpointCorrupted) where it is not."""
    state = _read(storage, name_of(step), config)
    if state is None:
        raise JobError(Reason.CHECKPOINT_CORRUPTED, f"{storage.locate(name_of(step))} cannot be read")
    return state


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What two configurations do not share, as `path: before, now after`."""
    old, new = dict(_flat(before)), dict(_flat(now))
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            yield f"{path} was {old.get(path)!r}, now {new.get(path)!r}"


def _names(storage: Storage) -> list[str]:
    """The checkpoints' names, the newest first."""
    return sorted((name for name in storage.folders() if _NAME.fullmatch(name)), reverse=True)


def _read(storage: Storage, name: str, config: Mapping[str, Any]) -> TrainingState | None:
    """The checkpoint, or None where it is incomplete or damaged."""
    manifest = read_manifest(storage, name)
    if manifest is None or manifest["format"] != FORMAT:
        return None
    if changed := list(differences(manifest["config"], config)):
        raise JobError(Reason.CHECKPOINT_INCOMPATIBLE, f"{storage.locate(name)} was made otherwise: {'; '.join(changed[:5])}")
    with storage.folder(name) as folder:
        if damage(folder, manifest) is not None:
            return None
        try:
            parameters, moments = load_file(folder / MODEL_FILE), load_file(folder / OPTIMIZER_FILE)
        except SafetensorError:
            return None
    return TrainingState(manifest["step"], manifest["trainedTokens"], parameters, moments)


def _on_cpu(tensors: Tensors) -> Tensors:
    """The tensors as safetensors wants them."""
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
