"""Prepared data, kept in output.storage and found again by what it was made from: a second job with the same data does not tokenise again.

    .finetune/cache/data/<key>/        a folder of prepared data (see data/examples.py), never changed once it is there
    .finetune/cache/data/<key>.json    when a job has last begun with it

The key covers the content of the sources, the tokenizer and every setting that the arrays follow from. It also covers where the sources
are: who can write to one can show other content while it is read than while its digest was taken, and is to deceive nobody who reads from
elsewhere. Nothing else refers to a folder but
the jobs that use it: it may be removed at any time; a job whose folder is gone prepares its data again. Folders that no job has begun with
for KEEP_DAYS are removed when another job prepares.
"""

import hashlib
import json
import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem

from finetune_api.scrub import scrub
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.data.examples import FORMAT, read_manifest
from finetune_trainer.data.inputs import Input, check_unchanged
from finetune_trainer.data.left_out import REJECTS
from finetune_trainer.data.prepare import (
    ExampleTeacher,
    field_of,
    fractions_of,
    inputs_of,
    loss_on,
    shows_examples,
    sources_of,
    wants_cases,
    write_data,
)
from finetune_trainer.data.tokenising import identity_of
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location, Mounts
from finetune_trainer.storage import Storage, storage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = ".finetune/cache/data"
KEEP_DAYS = 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """Prepared data in the storage."""

    name: str
    """Folder in output.storage."""
    manifest: dict[str, Any]
    is_new: bool
    """Whether it was made just now."""


def find_or_prepare(
    storage: Storage,
    job: FineTuneJob,
    mounts: Mounts,
    tokenizer: "PreTrainedTokenizerBase",
    longest: int | None = None,
    teacher: ExampleTeacher | None = None,
    made: Input | None = None,
) -> Entry:
    """The job's data, prepared: from the cache, or else read, checked, tokenised and put there. `storage` is output.storage.

    `made` is what the preparation has made, to be added to the training data. The rows that were left out are told of in the job's own
    folder, also where there are too many of them. Raises JobError: what write_data raises, and StorageFull, StorageUnavailable.
    """
    inputs = inputs_of(job, mounts, made)
    before = {split: source.state() for split, source in inputs.items()}
    name = f"{FOLDER}/{_key(job, inputs, tokenizer, longest, teacher)}"
    if (manifest := read_manifest(storage.location(name))) is not None:
        if _is_whole(storage, name, manifest):
            if REJECTS in manifest["bytes"]:
                _keep_rejects(storage, job, storage.location(f"{name}/{REJECTS}"))
            return Entry(name, manifest, is_new=False)
        storage.remove(name)
    with storage.shared_folder(name, owner=job.metadata.uid) as folder:
        left_out = Location(LocalFileSystem(), str(folder / REJECTS), f"file://{folder / REJECTS}")
        try:
            manifest = write_data(folder, job, inputs, tokenizer, longest, teacher)
        except JobError:
            with suppress(JobError, FileNotFoundError):
                _keep_rejects(storage, job, left_out)
            raise
        if REJECTS in manifest["bytes"]:
            _keep_rejects(storage, job, left_out)
        for split, source in inputs.items():  # else the key would promise what the folder does not hold
            check_unchanged(before[split], source.state(), field_of(split))
    # Another job may have been first, and a teacher does not say the same to both.
    return Entry(name, read_manifest(storage.location(name)) or manifest, is_new=True)


def _keep_rejects(storage: Storage, job: FineTuneJob, file: Location) -> None:
    """Copy the rows that were left out to where the job's owner finds them."""
    target = storage.location(f".finetune/{job.metadata.uid}/{REJECTS}")
    with storage_errors(target.uri):
        target.filesystem.makedirs(target.path.rpartition("/")[0], exist_ok=True)
        with file.filesystem.open(file.path, "rb") as source, target.filesystem.open(target.path, "wb") as copy:
            shutil.copyfileobj(source, copy)


def is_there(storage: Storage, name: str, digest: str) -> bool:
    """Whether a folder is there as it was written, and holds what it held: another job may have made it again, from other answers."""
    manifest = read_manifest(storage.location(name))
    return manifest is not None and manifest["digest"] == digest and _is_whole(storage, name, manifest)


def _is_whole(storage: Storage, name: str, manifest: dict[str, Any]) -> bool:
    """Whether each file has the size that it was written with."""
    folder = storage.location(name)
    with storage_errors(folder.uri):
        try:
            sizes = {file: int(folder.filesystem.info(f"{folder.path}/{file}")["size"]) for file in manifest["bytes"]}
        except FileNotFoundError:
            return False
    return bool(sizes == manifest["bytes"])


def mark_used(storage: Storage, name: str) -> None:
    """Note that a job begins with a folder, and remove those beside it that none has begun with for long. Neither is worth failing for."""
    now, folder = datetime.now(UTC), name.rpartition("/")[0]
    try:
        storage.write_json(f"{name}.json", {"used": now.isoformat()})
        storage.remove_abandoned(folder)
        for key in storage.folders(folder):
            other = f"{folder}/{key}"
            if not key.startswith(".") and other != name and _is_old(storage.read_json(f"{other}.json"), now):
                storage.remove(other)
                storage.remove(f"{other}.json")
    except JobError as error:
        log.warning("the cache %s was not looked after: %s", folder, scrub(error.message))


def _is_old(mark: Any | None, now: datetime) -> bool:  # noqa: ANN401 - any JSON
    """Whether a folder was last used long ago. One without a mark is just being begun with."""
    try:
        return isinstance(mark, dict) and now - datetime.fromisoformat(mark["used"]) > timedelta(days=KEEP_DAYS)
    except (KeyError, TypeError, ValueError):
        return False


def _key(
    job: FineTuneJob,
    inputs: dict[str, Input],
    tokenizer: "PreTrainedTokenizerBase",
    longest: int | None,
    teacher: ExampleTeacher | None,
) -> str:
    """sha256 over all that the arrays follow from, as 64 hexadecimal digits. Reads the sources' content once."""
    spec = job.spec
    fractions, preparation = fractions_of(job), spec.data.preparation
    settings = {
        "form": FORMAT,
        "sources": {split: source.identity() for split, source in inputs.items()},
        "places": _places(job),
        "tokenizer": identity_of(tokenizer),
        "format": spec.data.format,
        "columns": dict(spec.data.columns),
        "preferences": spec.objective.dpo is not None,
        "lossOn": loss_on(job),
        "maxSequenceLength": spec.training.max_sequence_length,
        "longest": longest,
        "heldOut": [fractions, spec.training.seed, spec.data.group_by] if fractions else None,
        "checks": preparation.model_dump(mode="json", include={"deduplicate", "leakage", "max_rejected_fraction"}),
        "limits": {suite.name: suite.limit for suite in spec.evaluation.suites if suite.data_source() is not None},
        "texts": [wants_cases(job), spec.training.seed if shows_examples(job) else None],
        **({} if teacher is None else {"teacher": teacher.identity()}),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _places(job: FineTuneJob) -> dict[str, Any]:
    """Where each split is read from. A claim, a ConfigMap and the server that a Secret names are the namespace's own."""
    named = {split: source.model_dump(mode="json", by_alias=True, exclude_none=True) for split, source in sources_of(job).items()}
    return {"namespace": job.metadata.namespace, **named}
