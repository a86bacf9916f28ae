"""Publishing: from what the workers left to a folder that the ecosystem loads with no edits, with the evidence beside it."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.reasons import Reason
from finetune_api.status import Artifact, Evaluation, Resolved
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.errors import JobError
from finetune_trainer.manifest import describe_files, digest_of, read_manifest, write_manifest
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.model_card import model_card
from finetune_trainer.result import RESULT, Result
from finetune_trainer.storage import MANIFEST, Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = "README.md"
PUBLISHING = "publishing.json"
"""In the job's own folder: that it has begun to put its result into a place that was free."""


def check_free(storage: Storage, job: FineTuneJob, own: Storage) -> None:
    """Raise JobError (InvalidSpec) where the artifact's place holds something of another's: it is not overwritten.

    Files without a manifest are the job's own where it was killed while it uploaded them.
    """
    kind = "adapter" if job.spec.method.lora is not None else "model"
    if not storage.exists(kind):
        return
    manifest = read_manifest(storage, kind)
    owner = manifest and manifest.get("job")
    if not owner and own.exists(PUBLISHING):
        return
    if not owner:
        raise JobError(Reason.INVALID_SPEC, f"{storage.locate(kind)} holds files that no job published: use another output.storage")
    if (owner["namespace"], owner["name"]) != (job.metadata.namespace, job.metadata.name):
        whose = f"{owner['namespace']}/{owner['name']}"
        raise JobError(Reason.INVALID_SPEC, f"{storage.locate(kind)} holds the result of the job {whose}: use another output.storage")


@dataclass(frozen=True)
class Publication:
    """What is to be published, and what is known of it."""

    job: FineTuneJob
    base: BaseModel
    tokenizer: "PreTrainedTokenizerBase"
    result: Result
    resolved: Resolved
    evaluation: Evaluation


def publish(publication: Publication, storage: Storage, own: Storage) -> Artifact:
    """Put the result in its place. Doing it again changes nothing. Raises JobError (PublishFailed, StorageFull, StorageUnavailable).

    `storage` is output.storage, `own` the job's folder in it, where the workers left the result.
    """
    job, base, result, resolved = publication.job, publication.base, publication.result, publication.resolved
    published = read_manifest(storage, result.kind)
    if published is not None and published["job"] == _job(job) and published["resolved"] == resolved.to_json():
        return _artifact(storage, result, published)
    check_free(storage, job, own)  # another job may have published since Prepare
    own.write_json(PUBLISHING, {"kind": result.kind})
    try:
        with own.folder(RESULT) as source, storage.new_folder(result.kind) as folder:
            shutil.copytree(source, folder, copy_function=_link, ignore=shutil.ignore_patterns(MANIFEST, CARD), dirs_exist_ok=True)
            publication.tokenizer.save_pretrained(folder)
            (folder / CARD).write_text(model_card(job, base, result, resolved, publication.evaluation), encoding="utf-8")
            write_manifest(
                folder,
                {
                    "kind": result.kind,
                    "job": _job(job),
                    "base": {"name": base.name, "revision": base.revision},
                    "resolved": resolved.to_json(),
                    "evaluation": publication.evaluation.to_json(),
                    "steps": result.steps,
                    "trainedTokens": result.trained_tokens,
                    "files": describe_files(folder),
                },
            )
    except JobError:
        raise
    except Exception as error:
        raise JobError(Reason.PUBLISH_FAILED, f"{storage.locate(result.kind)}: {type(error).__name__}: {error}") from error
    written = read_manifest(storage, result.kind)
    if written is None:
        raise JobError(Reason.PUBLISH_FAILED, f"{storage.locate(result.kind)} cannot be read again")
    return _artifact(storage, result, written)


def _artifact(storage: Storage, result: Result, manifest: Mapping[str, Any]) -> Artifact:
    return Artifact(
        kind=result.kind,
        uri=storage.locate(result.kind),
        digest=digest_of(manifest["files"]),
        bytes=sum(file["bytes"] for file in manifest["files"].values()),
    )


def _job(job: FineTuneJob) -> dict[str, str]:
    return {"namespace": job.metadata.namespace, "name": job.metadata.name, "uid": job.metadata.uid}


def _link(source: str, target: str) -> None:
    """The same file under another name where the file system can do that, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        Path(target).unlink(missing_ok=True)
        shutil.copyfile(source, target)
