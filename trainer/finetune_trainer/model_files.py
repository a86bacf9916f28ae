"""The base model's files: from where the job says to a folder on this machine."""

from dataclasses import dataclass
from pathlib import Path

from finetune_api.v1alpha1 import ModelSource
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.sources import Mounts


@dataclass(frozen=True)
class ModelFiles:
    """A folder with the model's files."""

    folder: Path
    base: BaseModel
    """Name and revision, as a published adapter says them."""
    revision: str
    """For status.resolved: the commit of a hub model, else a fingerprint of the files (`sha256:...`)."""
    weights: tuple[str, ...]
    """Names of the safetensors files that the model has, whether they are in the folder or not."""


def fetch_model(source: ModelSource, mounts: Mounts, cache: Path, *, weights: bool, revision: str | None = None) -> ModelFiles:
    """Bring the model's files to this machine: all (workers), or all but the weights (head). `revision` is the commit that the head resolved.

    Raises JobError (ModelNotFound, UnsafeModelFormat, AuthenticationFailed, SecretNotFound, ...).
    """
    raise NotImplementedError
