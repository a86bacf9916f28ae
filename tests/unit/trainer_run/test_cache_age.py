"""What of the cache is removed, and when."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from finetune_api.reasons import Reason
from finetune_trainer.data_cache import FOLDER, KEEP_DAYS, mark_used
from finetune_trainer.errors import JobError
from finetune_trainer.storage import MANIFEST, Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(LocalFileSystem(), str(tmp_path / "out"), f"file://{tmp_path}/out")


def test_what_a_killed_process_has_left_is_removed_after_a_while(storage: Storage) -> None:
    folder = Path(storage.location(FOLDER).path)
    for name in ("old", "new"):
        (folder / f".key.{name}.partial").mkdir(parents=True)
    os.utime(folder / ".key.old.partial", (0, 0))
    with storage.shared_folder(f"{FOLDER}/key") as made:
        (made / MANIFEST).write_text("{}")
    assert sorted(path.name for path in folder.iterdir()) == [".key.new.partial", "key"]


def used(storage: Storage, key: str, days_ago: float) -> None:
    with storage.shared_folder(f"{FOLDER}/{key}") as folder:
        (folder / MANIFEST).write_text("{}")
    storage.write_json(f"{FOLDER}/{key}.json", {"used": (datetime.now(UTC) - timedelta(days=days_ago)).isoformat()})


def test_what_no_job_has_begun_with_for_long_is_removed(storage: Storage) -> None:
    used(storage, "old", KEEP_DAYS + 1)
    used(storage, "fresh", KEEP_DAYS - 1)
    used(storage, "mine", KEEP_DAYS + 1)
    with storage.shared_folder(f"{FOLDER}/being-begun-with") as folder:
        (folder / MANIFEST).write_text("{}")
    mark_used(storage, f"{FOLDER}/mine")
    assert storage.folders(FOLDER) == ["being-begun-with", "fresh", "mine"]
    assert not storage.exists(f"{FOLDER}/old.json")


def test_what_was_never_completed_goes_with_it(storage: Storage) -> None:
    """Data that nobody prepares again: its half would else stay for ever."""
    folder = Path(storage.location(FOLDER).path)
    for name in (".gone.12345678.partial", ".fresh.12345678.partial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "train-tokens.npy").write_bytes(b"half")
    (folder / ".mark.json.12345678.partial").write_text("{")
    for name in (".gone.12345678.partial", ".mark.json.12345678.partial"):
        os.utime(folder / name, (0, 0))
    mark_used(storage, f"{FOLDER}/mine")
    assert sorted(path.name for path in folder.iterdir()) == [".fresh.12345678.partial", "mine.json"]


@pytest.mark.parametrize("mark", ["", "[]", "{}", '{"used": 3}', '{"used": "yesterday"}', '{"used": "2020-01-01"}'])
def test_a_mark_that_says_nothing_removes_nothing(storage: Storage, mark: str) -> None:
    used(storage, "odd", 0)
    Path(storage.location(f"{FOLDER}/odd.json").path).write_text(mark)
    mark_used(storage, f"{FOLDER}/mine")
    assert storage.folders(FOLDER) == ["odd"]


def test_a_storage_that_is_full_does_not_keep_a_job_from_its_data(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise JobError(Reason.STORAGE_FULL, "no space is left")

    monkeypatch.setattr(Storage, "write_json", full)
    mark_used(storage, f"{FOLDER}/mine")
    assert storage.folders(FOLDER) == []
