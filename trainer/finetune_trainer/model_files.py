"""The base model's files: from where the job says to a folder on this machine.

Only safetensors, configuration and tokenizer are ever fetched, and with model.trustRemoteCode the Python files beside them; pickled weights
stay where they are.
"""

import hashlib
import json
import os
import struct
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import ModelSource
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.sources import Location, Mounts, explained, files_under, hub_token, patiently, resolve

WEIGHTS = ("*.safetensors",)
OTHERS = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")
CODE = ("*.py",)
HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file that the format allows."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf")


@dataclass(frozen=True)
class ModelFiles:
    """A folder with the model's files."""

    folder: Path
    base: BaseModel
    """What a published adapter says of the model."""
    revision: str
    """For status.resolved: the commit of a hub model, else a fingerprint of the files (`sha256:...`)."""
    weights: tuple[str, ...]
    """Names of the safetensors files that the model has, whether they are in the folder or not."""
    trusted: bool = False
    """Whether the model's own code may run: job and profile both say so."""


def fetch_model(source: ModelSource, mounts: Mounts, cache: Path, *, weights: bool, revision: str | None = None) -> ModelFiles:
    """Bring the model's files to this machine: all (workers), or all but the weights (head).

    `revision` is what the head resolved: every worker and every later attempt gets the same, or is refused where the files have changed.
    A folder on a volume is used where it is.
    Raises JobError (ModelNotFound, UnsafeModelFormat, ModelInvalid, AuthenticationFailed, SecretNotFound, StorageUnavailable).
    """
    secret = source.secret_ref.name if source.secret_ref else None
    if source.source.startswith("hf://"):
        # On one machine the user's own cache serves all pods and later jobs; a pod's cache goes with the pod.
        folder = None if mounts.local else cache / "hub"
        return _from_hub(source, revision or source.revision, hub_token(mounts, secret), folder, weights=weights)
    place = resolve(source.source, mounts, secret)
    try:
        files = patiently(lambda: files_under(place))
    except Exception as error:
        raise explained(error, source.source, Reason.MODEL_NOT_FOUND) from error
    # Only the folder itself: what lies below it (checkpoints, the original's pickles) is not the model.
    names = tuple(name for file in files if "/" not in (name := file.path[len(place.path) :].lstrip("/")) and name)
    _check_names(names, source.source)
    code = CODE if source.trust_remote_code else ()
    if (local := place.local_path()) is None:
        local = _copied(place, names, cache, (*OTHERS, *code, *(WEIGHTS if weights else ())))
    else:
        for name in _matching(names, WEIGHTS):
            _check_safetensors(local / name, f"{source.source}/{name}")
    fingerprint = _fingerprint(place, _matching(names, (*OTHERS, *code, *WEIGHTS)), local)
    if revision is not None and revision != fingerprint:
        raise JobError(Reason.MODEL_INVALID, f"the files of {source.source} have changed since the job began")
    base = BaseModel(name=source.source.removeprefix("file://"), dtype=_dtype(local))
    return _with_own_code(ModelFiles(local, base, fingerprint, _matching(names, WEIGHTS)), source)


def _from_hub(source: ModelSource, revision: str | None, token: str | None, cache: Path | None, *, weights: bool) -> ModelFiles:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one line for each percent in a pod's log
    from huggingface_hub import HfApi, snapshot_download

    name = source.source.removeprefix("hf://")
    # False, not None: never a token that happens to lie in the pod's home.
    access: str | bool = token or False
    try:
        info = patiently(lambda: HfApi(token=access).model_info(name, revision=revision, timeout=30))
        names = tuple(file.rfilename for file in info.siblings or () if "/" not in file.rfilename)
        _check_names(names, source.source)
        wanted = [*OTHERS, *(CODE if source.trust_remote_code else ()), *(WEIGHTS if weights else ())]
        folder = patiently(
            lambda: snapshot_download(
                name, revision=info.sha, token=access, cache_dir=cache, allow_patterns=wanted, ignore_patterns=["*/*"]
            )
        )
    except Exception as error:
        raise explained(error, _with_revision(source.source, revision), Reason.MODEL_NOT_FOUND) from error
    commit = str(info.sha)
    files = ModelFiles(Path(folder), BaseModel(name, commit, _dtype(Path(folder))), commit, _matching(names, WEIGHTS))
    return _with_own_code(files, source)


def _with_own_code(files: ModelFiles, source: ModelSource) -> ModelFiles:
    """The files as those of a model whose code may run, where it may. Raises JobError where that code is another model's.

    A configuration may name classes of another repository (owner/name--module.Class), on which no allow-list has been asked.
    """
    if not source.trust_remote_code:
        return files
    for name in ("config.json", "tokenizer_config.json"):
        try:
            named = json.loads((files.folder / name).read_bytes()).get("auto_map") or {}
        except (OSError, ValueError, RecursionError, AttributeError):
            continue
        if "--" in json.dumps(named):
            raise JobError(
                Reason.MODEL_INVALID, f"{source.source}: auto_map of {name} names code of another repository; copy it beside the model"
            )
    return replace(files, trusted=True)


def fetch_below(source: ModelSource, mounts: Mounts, cache: Path, files: ModelFiles, name: str) -> Path:
    """One file of a folder below the model's own, such as `1_Pooling/config.json`, beside those that `fetch_model` has brought.

    Raises JobError (ModelInvalid) where it is not there, and as fetch_model does.
    """
    uri, target = f"{source.source}/{name}", files.folder / name
    secret = source.secret_ref.name if source.secret_ref else None
    try:
        if source.source.startswith("hf://"):
            from huggingface_hub import hf_hub_download

            # The same folder as the model's: it is the commit's.
            repository, folder = source.source.removeprefix("hf://"), None if mounts.local else cache / "hub"
            access: str | bool = hub_token(mounts, secret) or False
            return Path(patiently(lambda: hf_hub_download(repository, name, revision=files.revision, token=access, cache_dir=folder)))
        place = resolve(uri, mounts, secret)
        if (local := place.local_path()) is not None:
            if not local.is_file():
                raise FileNotFoundError(uri)
            return local
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.part")
            patiently(lambda: place.filesystem.get_file(place.path, str(aside)))
            aside.rename(target)
    except Exception as error:
        raise explained(error, uri, Reason.MODEL_INVALID) from error
    return target


def _with_revision(uri: str, revision: str | None) -> str:
    return f"{uri} at {revision}" if revision else uri


def _check_names(names: tuple[str, ...], uri: str) -> None:
    """Raises JobError where the files cannot be a model that may be loaded."""
    if not names:
        raise JobError(Reason.MODEL_NOT_FOUND, f"{uri} holds no files")
    if "config.json" not in names:
        raise JobError(Reason.MODEL_INVALID, f"{uri} has no config.json")
    if "adapter_config.json" in names:  # transformers would load it, too
        raise JobError(Reason.MODEL_INVALID, f"{uri} holds an adapter (adapter_config.json); name a whole model")
    if _matching(names, WEIGHTS):
        return
    pickled = _matching(names, _PICKLES)
    if pickled:
        raise JobError(Reason.UNSAFE_MODEL_FORMAT, f"{uri} has no safetensors, only {pickled[0]}, which is never loaded")
    raise JobError(Reason.MODEL_INVALID, f"{uri} has no weights (*.safetensors)")


def _matching(names: tuple[str, ...], patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)))


def _copied(place: Location, names: tuple[str, ...], cache: Path, patterns: tuple[str, ...]) -> Path:
    """The wanted files in a local folder that is named by the place; one that is already whole is not fetched again."""
    folder = cache / "models" / hashlib.sha256(place.uri.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name in _matching(names, patterns):
        target, aside = folder / name, folder / f".{name}.part"
        if target.exists():
            continue
        try:
            patiently(lambda name=name, aside=aside: place.filesystem.get_file(f"{place.path}/{name}", str(aside)))  # type: ignore[misc]
        except Exception as error:
            raise explained(error, f"{place.uri}/{name}", Reason.MODEL_NOT_FOUND) from error
        aside.rename(target)
    return folder


def _check_safetensors(path: Path, uri: str) -> None:
    """A file that was cut off or is something else is found by its header, without its weights being read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            header = json.loads(file.read(length)) if length < min(size, HEADER_BYTES) else None
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)  # type: ignore[union-attr]
    except (OSError, ValueError, RecursionError, struct.error, AttributeError, KeyError, TypeError, IndexError) as error:
        raise JobError(Reason.MODEL_INVALID, f"{uri} is not a safetensors file") from error
    if size != 8 + length + end:
        raise JobError(Reason.MODEL_INVALID, f"{uri} is damaged: {size} bytes instead of {8 + length + end}")


def _dtype(folder: Path) -> str | None:
    """The number format of the weights, as the configuration has it."""
    try:
        config: Any = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    dtype = config.get("dtype") or config.get("torch_dtype")
    return dtype if dtype in ("float32", "float16", "bfloat16") else None


_SAMPLE = 1 << 20


def _fingerprint(place: Location, names: tuple[str, ...], local: Path) -> str:
    """`sha256:...` over the names, the sizes, the whole of each small file and the first and last MiB of each large one.

    Tells one model from another and from a retrained one at the cost of a few reads, whatever its size.
    """
    digest = hashlib.sha256()
    for name in names:
        remote = f"{place.path}/{name}"
        size = int(place.filesystem.size(remote))
        digest.update(f"{name}/{size}\n".encode())
        path = local / name
        with path.open("rb") if path.exists() else place.filesystem.open(remote, "rb") as file:
            digest.update(file.read(_SAMPLE))
            if size > _SAMPLE:
                file.seek(max(size - _SAMPLE, _SAMPLE))
                digest.update(file.read(_SAMPLE))
    return f"sha256:{digest.hexdigest()}"
