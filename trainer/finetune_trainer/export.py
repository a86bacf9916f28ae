"""Publishing: from what the workers left to a folder that the ecosystem loads with no edits, with the evidence beside it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_api.reasons import Reason
from finetune_api.status import Artifact, ArtifactKind
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.errors import JobError
from finetune_trainer.manifest import describe_files, digest_of, read_manifest, write_manifest
from finetune_trainer.model_card import Publication, model_card
from finetune_trainer.result import RESULT
from finetune_trainer.storage import MANIFEST, Storage

CARD = "README.md"
PUBLISHING = "publishing.json"
"""In the job's own folder: that it has begun to put its result into a place that was free."""


def check_free(storage: Storage, job: FineTuneJob, own: Storage) -> None:
    """Raise JobError (InvalidSpec) where an artifact's place holds something of another's: it is not overwritten.

    Files without a manifest are the job's own where it was killed while it uploaded them.
    """
    for kind in job.spec.artifacts:
        if not storage.exists(kind):
            continue
        manifest = read_manifest(storage, kind)
        owner = manifest and manifest.get("job")
        if not owner and own.exists(PUBLISHING):
            continue
        if not owner:
            raise JobError(Reason.INVALID_SPEC, f"{storage.locate(kind)} holds files that no job published: use another output.storage")
        if (owner["namespace"], owner["name"]) != (job.metadata.namespace, job.metadata.name):
            whose = f"{owner['namespace']}/{owner['name']}"
            raise JobError(Reason.INVALID_SPEC, f"{storage.locate(kind)} holds the result of the job {whose}: use another output.storage")


def publish(publication: Publication, storage: Storage, own: Storage) -> tuple[Artifact, ...]:
    """Put each kind of the result in its place. Doing it again changes nothing, and goes on where it was killed.

    `storage` is output.storage, `own` the job's folder in it, where the workers left the result.
    Raises JobError (InvalidSpec, PublishFailed, StorageFull, StorageUnavailable).
    """
    kinds = publication.result.kinds
    there = {kind: _published(publication, storage, kind) for kind in kinds}
    if not all(there.values()):
        check_free(storage, publication.job, own)  # another job may have published since Prepare
        own.write_json(PUBLISHING, {"kinds": list(kinds)})
    return tuple(there[kind] or _publish(publication, storage, own, kind) for kind in kinds)


def _published(publication: Publication, storage: Storage, kind: ArtifactKind) -> Artifact | None:
    """The artifact where it is in its place already."""
    manifest = read_manifest(storage, kind)
    if manifest is None or manifest["job"] != _job(publication.job) or manifest["resolved"] != publication.resolved.to_json():
        return None
    return _artifact(storage, kind, manifest)


def _publish(publication: Publication, storage: Storage, own: Storage, kind: ArtifactKind) -> Artifact:
    base, result = publication.base, publication.result
    try:
        with own.folder(f"{RESULT}/{kind}") as source, storage.new_folder(kind) as folder:
            shutil.copytree(source, folder, copy_function=_link, ignore=shutil.ignore_patterns(MANIFEST, CARD), dirs_exist_ok=True)
            publication.tokenizer.save_pretrained(folder)
            (folder / CARD).write_text(model_card(publication, kind), encoding="utf-8")
            write_manifest(
                folder,
                {
                    "kind": kind,
                    "job": _job(publication.job),
                    "base": {"name": base.name, "revision": base.revision},
                    "resolved": publication.resolved.to_json(),
                    "evaluation": publication.evaluation.to_json(),
                    "model": publication.model.to_json(),
                    "steps": result.steps,
                    "trainedTokens": result.trained_tokens,
                    "files": describe_files(folder),
                },
            )
    except JobError:
        raise
    except Exception as error:
        raise JobError(Reason.PUBLISH_FAILED, f"{storage.locate(kind)}: {type(error).__name__}: {error}") from error
    written = read_manifest(storage, kind)
    if written is None:
        raise JobError(Reason.PUBLISH_FAILED, f"{storage.locate(kind)} cannot be read again")
    return _artifact(storage, kind, written)


def _artifact(storage: Storage, kind: ArtifactKind, manifest: Mapping[str, Any]) -> Artifact:
    return Artifact(
        kind=kind,
        uri=storage.locate(kind),
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
