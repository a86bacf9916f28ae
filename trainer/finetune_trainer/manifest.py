"""The manifest of a folder: what is in it, with sha256 and size of each file, so that a folder is known to be whole before it is used."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from finetune_trainer.storage import MANIFEST, Storage


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a folder's manifest, with a digest of itself in it."""
    sealed = {**content, "digest": digest_of(content)}
    (folder / MANIFEST).write_text(json.dumps(sealed, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(storage: Storage, name: str) -> dict[str, Any] | None:
    """The manifest of a folder; None where it is absent, or not as it was written."""
    manifest = storage.read_json(f"{name}/{MANIFEST}")
    if not isinstance(manifest, dict):
        return None
    digest = manifest.pop("digest", None)
    return manifest if digest == digest_of(manifest) else None


def digest_of(value: Mapping[str, Any]) -> str:
    """`sha256:...` over a JSON object, whatever the order of its keys."""
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe_files(folder: Path, names: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """sha256 and size of each file below a folder but its manifest, or of those with these names, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    described = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for name, path in described.items() if names is None or name in names
    }


def damage(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a folder's files by its manifest, or None."""
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} has another sha256"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
