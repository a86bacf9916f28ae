"""The manifest and what it refers to, read and checked before anything starts. Every error names file, line and field."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from finetune_api import KIND
from finetune_api.fields import ObjectName
from finetune_api.references import references_of
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_operator.local.cluster import data_of
from finetune_operator.local.state import State
from finetune_operator.manifest import Manifest, ManifestError, explain, read_file
from finetune_operator.profile_file import ProfileError, read_profile, under

_KEY = re.compile(r"^(?!\.\.)[-._a-zA-Z0-9]{1,253}$")
_IGNORED = ("PersistentVolumeClaim", "PersistentVolume", "Namespace", "ServiceAccount")
"""Kinds that may stand beside a job and mean nothing on this machine."""

_S3_FROM_ENV: Mapping[str, Sequence[str]] = {
    "accessKeyId": ("AWS_ACCESS_KEY_ID",),
    "secretAccessKey": ("AWS_SECRET_ACCESS_KEY",),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
}
_FROM_ENV: tuple[tuple[str, Mapping[str, Sequence[str]]], ...] = (
    ("s3://", _S3_FROM_ENV),
    ("http", {"token": ("OPENAI_API_KEY",)}),
    ("", {"token": ("HF_TOKEN",)}),
)
"""Keys of the Secret of a URI that begins so, with the variables that may give them instead."""

Keys = dict[str, dict[str, bytes]]
"""Keys of ConfigMaps or Secrets by name."""


class InputError(Exception):
    """What the user must change before the job can start, a line for each fault."""


@dataclass(frozen=True)
class Inputs:
    """A job and what it refers to."""

    manifest: dict[str, Any]
    """The job as the file has it."""
    job: FineTuneJob
    config_maps: Keys
    secrets: Keys
    notes: tuple[str, ...] = ()
    """What the user should know, though it stops nothing."""


@dataclass(frozen=True)
class Given:
    """What the command line adds to the file: `--config-map NAME=FILE_OR_FOLDER`, `--claim NAME[/PATH]=FOLDER`."""

    config_maps: Mapping[str, Path] = field(default_factory=dict)
    claims: Mapping[str, Path] = field(default_factory=dict)
    profile: Path | None = None
    """File of the TuningProfile that the job runs under: `--profile FILE`."""


def read_inputs(path: Path, given: Given, env: Mapping[str, str]) -> Inputs:
    """The one job of a file, with its ConfigMaps and Secrets. Raises InputError."""
    documents = _documents(path)
    jobs = [document for document in documents if document.get("kind") == KIND]
    if len(jobs) != 1:
        raise InputError(f"{path}: holds {len(jobs)} objects of kind {KIND}; a local run takes exactly one")
    try:
        profile = read_profile(given.profile) if given.profile else None
    except ProfileError as error:
        raise InputError(str(error)) from None
    try:
        job = under(parse_job(jobs[0], local=True), profile, local=True)
    except ValidationError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in explain(error, jobs[0]))) from None
    except ProfileError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    config_maps, secrets, notes = _others(path, documents)
    config_maps |= {name: _keys_at(name, source) for name, source in given.config_maps.items()}
    for name, keys in _secrets_wanted(job).items():
        if name not in secrets and (found := _from_env(keys, env)):
            secrets[name] = found
            notes += _told_where(job, name, path)
    inputs = Inputs(dict(jobs[0]), job, config_maps, secrets, tuple(notes))
    faults = list(_missing(inputs, path, jobs[0]))
    if faults:
        raise InputError("\n".join(faults))
    return inputs


def place(inputs: Inputs, given: Given, state: State) -> None:
    """Put what the job refers to where its pods look for it. Raises InputError."""
    for name, keys in inputs.config_maps.items():
        state.write_keys(state.config_map(name), keys)
    for name, keys in inputs.secrets.items():
        state.write_keys(state.secret(name), keys)
    for claim in _claims(inputs.job):
        if claim not in given.claims and not state.claim(claim).exists():
            state.claim(claim).mkdir(parents=True)
    for target, source in given.claims.items():
        _place_claim(target, source, state)


def missing_files(inputs: Inputs, path: Path, state: State) -> list[str]:
    """Sources in claims and files of this machine that are not there, once everything is in place."""
    faults = []
    for where, uri in _sources(inputs.job):
        here = local_path(uri, state, path.parent)
        if here is not None and not here.exists():
            claim = uri.removeprefix("pvc://")
            remedy = f"; put it there, or pass --claim {claim}=FILE_OR_FOLDER" if uri.startswith("pvc://") else ""
            faults.append(f"{path}: {where}: {uri} does not exist: there is no {here}{remedy}")
    return faults


def local_path(uri: str, state: State, folder: Path) -> Path | None:
    """Where a URI leads on this machine; None where it leads elsewhere. `folder` is what relative file:// paths start from."""
    scheme, _, rest = uri.partition("://")
    if scheme == "pvc":
        claim, _, inside = rest.partition("/")
        return state.claim(claim) / inside
    return folder / rest if scheme == "file" else None


def with_absolute_files(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A spec whose relative file:// URIs start from the manifest's folder."""

    def absolute(value: object) -> object:
        if isinstance(value, dict):
            return with_absolute_files(value, folder)
        if isinstance(value, list):
            return [absolute(item) for item in value]
        if isinstance(value, str) and value.startswith("file://"):
            return f"file://{(folder / value.removeprefix('file://')).resolve()}"
        return value

    return {key: absolute(value) for key, value in spec.items()}


def _documents(path: Path) -> list[Manifest]:
    try:
        return read_file(path)
    except ManifestError as error:
        raise InputError(f"{path}: {error}") from None


def _others(path: Path, documents: Sequence[Manifest]) -> tuple[Keys, Keys, list[str]]:
    """ConfigMaps, Secrets and notes from the documents that are not the job."""
    found: dict[str, Keys] = {"ConfigMap": {}, "Secret": {}}
    notes = []
    for document in documents:
        kind, where = document.get("kind"), f"{path}: line {document.line(('kind',)) or 1}"
        if kind in found:
            name = (document.get("metadata") or {}).get("name")
            if not isinstance(name, str) or not _is_name(name):
                raise InputError(f"{where}: {kind}: metadata.name must be a name as Kubernetes has them, not {name!r}")
            try:
                keys = data_of(document)
            except (ValueError, AttributeError) as error:
                raise InputError(f"{where}: {kind} {name}: data cannot be read: {error}") from None
            if wrong := [key for key in keys if not _KEY.match(key)]:
                raise InputError(f"{where}: {kind} {name}: {wrong[0]!r} cannot be a key")
            found[kind][name] = keys
        elif kind != KIND and kind not in _IGNORED:
            notes.append(f"{where}: kind {kind} means nothing in a local run")
    return found["ConfigMap"], found["Secret"], notes


def _is_name(name: str) -> bool:
    """Whether Kubernetes takes it for the name of an object."""
    try:
        TypeAdapter(ObjectName).validate_python(name, strict=True)
    except ValidationError:
        return False
    return True


def _keys_at(name: str, source: Path) -> dict[str, bytes]:
    """The keys that `kubectl create configmap --from-file` would make of a file or folder. Raises InputError."""
    if not _is_name(name):
        raise InputError(f"--config-map {name}={source}: {name!r} cannot be the name of a ConfigMap")
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    try:
        return {path.name: path.read_bytes() for path in files if _KEY.match(path.name)}
    except OSError as error:
        raise InputError(f"--config-map {name}={source}: {error.strerror}: {error.filename}") from None


def _place_claim(target: str, source: Path, state: State) -> None:
    """A whole claim becomes a link to the folder; a path in a claim gets the files, linked where the file system can, else copied.

    A link within a claim would lead out of the claim, which the trainer refuses.
    """
    claim, _, inside = target.partition("/")
    option = f"--claim {target}={source}"
    if not _is_name(claim) or ".." in Path(inside).parts or Path(inside).is_absolute():
        raise InputError(f"{option}: {target!r} is not NAME or NAME/PATH")
    if not source.exists() or (not inside and not source.is_dir()):
        raise InputError(f"{option}: there is no such {'file or ' if inside else ''}folder")
    folder = state.claim(claim)
    if inside:
        folder.mkdir(parents=True, exist_ok=True)
        _mirror(source.resolve(), folder / inside)
        return
    if folder.is_symlink() or not folder.exists():
        folder.unlink(missing_ok=True)
        folder.symlink_to(source.resolve(), target_is_directory=True)
    elif folder.resolve() != source.resolve():
        raise InputError(f"{option}: {folder} holds files of earlier runs; remove it, or leave the option out")


def _mirror(source: Path, target: Path) -> None:
    """The same files in another place, without using space twice where that can be had."""

    def link(old: str, new: str) -> str:
        aside = Path(f"{new}.partial")
        aside.unlink(missing_ok=True)
        try:
            os.link(old, aside)
        except OSError:
            shutil.copyfile(old, aside)
        aside.replace(new)
        # A rename onto another link of the same file leaves both names.
        aside.unlink(missing_ok=True)
        return new

    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
    else:
        link(str(source), str(target))


def _sources(job: FineTuneJob) -> Iterator[tuple[str, str]]:
    """Every URI that the job reads from, with its field; the fresh data of its monitoring may come later."""
    for reference in references_of(job.spec):
        if reference.use in ("model", "data") and reference.uri is not None and not reference.field.startswith("spec.monitoring."):
            yield f"{reference.field}.source", reference.uri


def _claims(job: FineTuneJob) -> tuple[str, ...]:
    """Claims that the job names."""
    return tuple(dict.fromkeys(reference.claim for reference in references_of(job.spec) if reference.claim))


def _secrets_wanted(job: FineTuneJob) -> dict[str, Mapping[str, Sequence[str]]]:
    """Secrets that the job names, with the keys that the environment may give instead, and their variables."""
    return {
        reference.secret: next(keys for scheme, keys in _FROM_ENV if (reference.uri or "").startswith(scheme))
        for reference in references_of(job.spec)
        if reference.secret
    }


def _told_where(job: FineTuneJob, name: str, path: Path) -> Iterator[str]:
    """Where a key of the environment is sent: a manifest of somebody else's may name any address."""
    for reference in references_of(job.spec):
        if reference.secret == name and reference.use == "endpoint":
            yield f"{path}: {reference.field}: a key of your environment is sent to {reference.uri}, as the Secret {name}"


def _from_env(keys: Mapping[str, Sequence[str]], env: Mapping[str, str]) -> dict[str, bytes]:
    """The keys that the environment gives."""
    return {key: env[found].encode() for key, names in keys.items() if (found := next((name for name in names if env.get(name)), None))}


def _missing(inputs: Inputs, path: Path, manifest: Manifest) -> Iterator[str]:
    """ConfigMaps and Secrets that the job names and nobody gives."""
    for reference in references_of(inputs.job.spec):
        if reference.config_map is None:
            continue
        at = f"{path}: {_line(manifest, reference.field)}{reference.field}.configMap"
        name, key = reference.config_map.name, reference.config_map.key
        if name not in inputs.config_maps:
            yield f"{at}: there is no ConfigMap {name} here; add it to the file, or pass --config-map {name}=FILE_OR_FOLDER"
        elif key not in inputs.config_maps[name]:
            known = ", ".join(sorted(inputs.config_maps[name])) or "none"
            yield f"{at}: the ConfigMap {name} has no key {key}; its keys: {known}"
    for name, keys in _secrets_wanted(inputs.job).items():
        if name not in inputs.secrets:
            names = ", ".join(variables[0] for variables in keys.values())
            yield f"{path}: there is no Secret {name} here; add it to the file, or set {names} in the environment"


def _line(manifest: Manifest, where: str) -> str:
    line = manifest.line(tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", where)))
    return f"line {line}: " if line else ""
