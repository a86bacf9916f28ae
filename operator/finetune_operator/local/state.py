"""The folder that stands in for the cluster's memory and volumes.

    claims/<claim>/...           PersistentVolumeClaims          logs/<pod>.log
    configmaps/<name>/<key>      ConfigMaps                      pods/<pod>/   what belongs to one pod
    secrets/<name>/<key>         Secrets (mode 0600)             token-key     key of the attempts' tokens (mode 0600)

The job itself, with its status, stands beside its manifest as `<name>.status.yaml`.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_METADATA = ".metadata.json"
"""File beside a ConfigMap's keys; no key can have this name, since it would not be made from a manifest's `metadata`."""


class StateError(Exception):
    """The folder cannot be used: another run has it, or it holds what no run wrote."""


@dataclass(frozen=True)
class State:
    """Places in the folder."""

    root: Path

    def claim(self, name: str) -> Path:
        """Folder of a PersistentVolumeClaim."""
        return self.root / "claims" / name

    def config_map(self, name: str) -> Path:
        """Folder with a file for each key of a ConfigMap."""
        return self.root / "configmaps" / name

    def secret(self, name: str) -> Path:
        """Folder with a file for each key of a Secret."""
        return self.root / "secrets" / name

    def pod(self, name: str) -> Path:
        """Folder of a pod: its object, its mark, its own volumes."""
        return self.root / "pods" / name

    def log(self, pod: str) -> Path:
        """What a pod has written; it stays when the pod goes."""
        return self.root / "logs" / f"{pod}.log"

    def logs_of(self, job: str) -> list[Path]:
        """The logs of all pods that a job has had."""
        name = re.compile(rf"{re.escape(job)}-\d+-(head|worker-\d+)\.log")
        return [path for path in (self.root / "logs").iterdir() if name.fullmatch(path.name)]

    def prepare(self) -> None:
        """Make the folders that are missing. Raises OSError."""
        for name in ("claims", "configmaps", "logs", "pods", "secrets"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "secrets").chmod(0o700)
        (self.root / "pods").chmod(0o700)

    def token_key(self) -> bytes:
        """Key that this folder's tokens are derived from; drawn at the first use."""
        path = self.root / "token-key"
        if not path.exists():
            write_private(path, secrets.token_hex(32).encode())
        return path.read_bytes()

    @contextlib.contextmanager
    def locked(self, job: str) -> Iterator[None]:
        """Hold the job, so that no second run works on it. The system lets go when this process ends, however it ends."""
        path = self.root / f"{job}.lock"
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise StateError(f"another `finetune local` (process {file.read().strip() or 'unknown'}) is running {job}") from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def write_keys(self, folder: Path, content: Mapping[str, bytes], metadata: Mapping[str, Any] | None = None) -> None:
        """Replace a ConfigMap's or Secret's keys; a file is never seen half written."""
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        for path in folder.iterdir():
            if path.name not in content:
                path.unlink()
        for key, value in content.items():
            write_private(folder / key, value)
        if metadata is not None:
            write_private(folder / _METADATA, json.dumps(metadata).encode())

    def config_maps(self) -> list[dict[str, Any]]:
        """Metadata of the ConfigMaps that were applied as objects."""
        found = sorted((self.root / "configmaps").glob(f"*/{_METADATA}"))
        return [{"metadata": json.loads(path.read_text())} for path in found]


def write_private(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, for this user only (mode 0600). Raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object whole or not at all, for this user only. Raises OSError."""
    write_private(path, json.dumps(value).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def remove(folder: Path) -> None:
    """Remove a folder and what is in it; one that is absent is fine, a link is removed and not followed."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


# Written in C where PyYAML was built with libyaml; the file is read several times a second.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class JobFile:
    """The job with its status, in a file that a person can read and a later run goes on from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, Any] | None:
        """The stored object, or None where there is none. Raises StateError where the file holds something else."""
        try:
            job = yaml.load(self.path.read_text(), Loader=_Loader)  # noqa: S506 - a safe loader
        except FileNotFoundError:
            return None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise StateError(f"{self.path} cannot be read: {error}") from None
        if not isinstance(job, dict) or not isinstance(job.get("metadata"), dict) or not job["metadata"].get("uid"):
            raise StateError(f"{self.path} does not hold a job that ran here; remove or rename the file")
        return job

    def save(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Write the object with the next resourceVersion, whole or not at all; the object as it is now. Raises OSError."""
        version = str(int(job["metadata"].get("resourceVersion") or 0) + 1)
        stored = {**job, "metadata": {**job["metadata"], "resourceVersion": version}}
        text = yaml.safe_dump(stored, sort_keys=False, allow_unicode=True, width=140)
        write_private(self.path, text.encode())
        return stored

    def remove(self) -> None:
        """Forget the job."""
        self.path.unlink(missing_ok=True)
