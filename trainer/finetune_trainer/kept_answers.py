"""What models have said, kept in a folder of the storage, so that it is paid for once.

The folder holds JSON objects, each with some answers by the digest of what was asked.
"""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from finetune_trainer.manifest import digest_of
from finetune_trainer.storage import Storage, storage_errors


def read_kept(storage: Storage) -> Iterator[tuple[str, Any]]:
    """Every answer in the folder, as JSON, by its digest. What cannot be read counts for nothing. Raises JobError (StorageUnavailable)."""
    with storage_errors(storage.uri):
        storage.fs.invalidate_cache()
        names = [PurePosixPath(path).name for path in storage.fs.ls(storage.root, detail=False)] if storage.fs.exists(storage.root) else []
    for name in sorted(names):
        batch = storage.read_json(name) if name.endswith(".json") and not name.startswith(".") else None
        if isinstance(batch, dict):
            yield from batch.items()


def keep(storage: Storage, answers: Mapping[str, Any]) -> None:
    """Add answers, in a file of their own: two processes that keep the same write the same. Raises JobError (StorageFull, ...)."""
    if answers:
        storage.write_json(f"{digest_of({'answers': list(answers)})[7:39]}.json", answers)
