"""What the workers leave for the head: the trained weights as they will be published, and the figures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune_trainer.manifest import damage, describe_files, read_manifest, write_manifest
from finetune_trainer.storage import Storage

RESULT = "result"


@dataclass(frozen=True)
class Result:
    """The end of a training."""

    steps: int
    trained_tokens: int
    before: dict[str, float]
    """Losses of the untuned model by split."""
    after: dict[str, float]
    """Losses of the tuned model by split."""
    config: dict[str, Any]
    """Everything that it follows from."""
    kind: Literal["adapter", "model"] = "adapter"
    """What the files are."""


def write_result(storage: Storage, result: Result, export: Callable[[Path], Literal["adapter", "model"]]) -> None:
    """Leave the result in the job's folder, whole or not at all. `export` fills the folder."""
    with storage.new_folder(RESULT) as folder:
        kind = export(folder)
        write_manifest(
            folder,
            {
                "kind": kind,
                "steps": result.steps,
                "trainedTokens": result.trained_tokens,
                "before": result.before,
                "after": result.after,
                "config": result.config,
                "files": describe_files(folder),
            },
        )


def read_result(storage: Storage, config: dict[str, Any]) -> Result | None:
    """The result of a training under this configuration, or None where there is none, or none whole."""
    manifest = read_manifest(storage, RESULT)
    if manifest is None or manifest["config"] != config:
        return None
    with storage.folder(RESULT) as folder:
        if damage(folder, manifest) is not None:
            return None
    return Result(
        steps=manifest["steps"],
        trained_tokens=manifest["trainedTokens"],
        before=manifest["before"],
        after=manifest["after"],
        config=manifest["config"],
        kind=manifest["kind"],
    )
