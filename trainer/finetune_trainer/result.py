"""What the workers leave for the head: the trained weights as they will be published, and the figures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.status import ArtifactKind
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
    kinds: tuple[ArtifactKind, ...] = ("adapter",)
    """What the files are: a folder for each kind."""


def write_result(storage: Storage, result: Result, export: Callable[[Path, ArtifactKind], None]) -> None:
    """Leave the result in the job's folder, whole or not at all: `result/<kind>/` for each of its kinds, which `export` fills.

    `merged` comes last, since the model is not to be used after it.
    """
    with storage.new_folder(RESULT) as folder:
        for kind in sorted(result.kinds, key=lambda kind: kind == "merged"):
            (folder / kind).mkdir()
            export(folder / kind, kind)
        write_manifest(
            folder,
            {
                "kinds": list(result.kinds),
                "steps": result.steps,
                "trainedTokens": result.trained_tokens,
                "before": result.before,
                "after": result.after,
                "config": result.config,
                "files": describe_files(folder),
            },
        )


def read_result(storage: Storage, config: dict[str, Any], name: str = RESULT) -> Result | None:
    """The result of a training under this configuration, or None where there is none, or none whole; `name` is its folder."""
    manifest = read_manifest(storage, name)
    if manifest is None or manifest["config"] != config or "kinds" not in manifest:
        return None
    with storage.folder(name) as folder:
        if damage(folder, manifest) is not None:
            return None
    return Result(
        steps=manifest["steps"],
        trained_tokens=manifest["trainedTokens"],
        before=manifest["before"],
        after=manifest["after"],
        config=manifest["config"],
        kinds=tuple(manifest["kinds"]),
    )
