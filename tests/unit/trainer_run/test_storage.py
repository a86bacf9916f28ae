"""A name in the storage is complete or not there, on a file system and in an object store."""

import errno
import json
import tempfile
import threading
from pathlib import Path

import pytest
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs as arrow

from finetune_api.reasons import Reason
from finetune_trainer.data.shelf import Shelf
from finetune_trainer.errors import JobError
from finetune_trainer.storage import Storage


@pytest.fixture(params=["file system", "object store", "arrow"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """fsspec's memory file system stands for an object store; arrow's interface is the one that S3 is reached by."""
    if request.param == "file system":
        return Storage(LocalFileSystem(), str(tmp_path / "root"), f"file://{tmp_path}/root")
    if request.param == "arrow":
        (tmp_path / "root").mkdir()
        return Storage(ArrowFSWrapper(arrow.LocalFileSystem()), str(tmp_path / "root"), "s3://bucket/root")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return Storage(MemoryFileSystem(), "/bucket/root", "s3://bucket/root")


def fill(storage: Storage, name: str, text: str) -> None:
    with storage.new_folder(name) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)
        (folder / "manifest.json").write_text(json.dumps({"text": text}))


def test_a_new_folder_is_there_when_it_is_left(storage: Storage) -> None:
    fill(storage, "a/b", "one")
    assert storage.folders("a") == ["b"]
    assert storage.read_json("a/b/manifest.json") == {"text": "one"}
    with storage.folder("a/b") as folder:
        assert (folder / "sub" / "file").read_text() == "one"
    assert storage.locate("a/b").endswith("root/a/b")


def test_files_on_a_volume_can_be_read_by_whoever_serves_the_model(tmp_path: Path) -> None:
    storage = Storage(LocalFileSystem(), str(tmp_path / "root"), f"file://{tmp_path}/root")
    with storage.new_folder("adapter") as folder:
        (folder / "weights").touch(mode=0o600)
        (folder / "manifest.json").write_text("{}")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "root" / "adapter").iterdir()}
    assert modes == {"weights": 0o644, "manifest.json": 0o644}


def test_a_folder_is_replaced_whole(storage: Storage) -> None:
    fill(storage, "adapter", "one")
    fill(storage, "adapter", "two")
    assert storage.read_json("adapter/manifest.json") == {"text": "two"}
    assert storage.folders() == ["adapter"]


def test_a_folder_that_was_not_finished_is_not_there(storage: Storage) -> None:
    fill(storage, "adapter", "one")

    def fill_half() -> None:
        with storage.new_folder("adapter") as folder:
            (folder / "manifest.json").write_text("{}")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fill_half()
    assert storage.read_json("adapter/manifest.json") == {"text": "one"}
    assert storage.folders() == ["adapter"]


def test_in_an_object_store_the_manifest_comes_last_and_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    MemoryFileSystem.store.clear()
    storage = Storage(MemoryFileSystem(), "/bucket/root", "s3://bucket/root")
    fill(storage, "adapter", "one")
    put: list[str] = []

    def cut(local: str, remote: str, **_: object) -> None:
        put.append(remote)
        raise ConnectionError("reset")

    monkeypatch.setattr(storage.fs, "put_file", cut)
    with pytest.raises(JobError, match="reset") as caught:
        fill(storage, "adapter", "two")
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE
    assert put == ["/bucket/root/adapter/sub/file"]
    assert storage.read_json("adapter/manifest.json") is None


def test_a_writer_that_was_given_up_puts_nothing_half_filled_in_place(tmp_path: Path) -> None:
    """The workers of a head that was lost may go on for a while beside those of the next attempt."""
    storage = Storage(LocalFileSystem(), str(tmp_path), "pvc://models")
    given_up, successor = storage.new_folder("step-1"), storage.new_folder("step-1")
    (given_up.__enter__() / "manifest.json").write_text("{}")
    folder = successor.__enter__()
    (folder / "file").write_text("a half")
    with pytest.raises(JobError):
        given_up.__exit__(None, None, None)
    assert storage.folders() == [folder.name]
    (folder / "file").write_text("the whole")
    successor.__exit__(None, None, None)
    assert (tmp_path / "step-1" / "file").read_text() == "the whole"
    assert storage.folders() == ["step-1"]


def test_a_file_is_replaced_whole(storage: Storage) -> None:
    assert storage.read_json("report.json") is None
    storage.write_json("report.json", {"a": 1})
    storage.write_json("report.json", {"a": 2})
    assert storage.read_json("report.json") == {"a": 2}


def test_what_is_no_json_is_not_there(storage: Storage) -> None:
    storage.fs.makedirs(storage.root, exist_ok=True)
    storage.fs.pipe_file(f"{storage.root}/report.json", b'{"a": ')
    assert storage.read_json("report.json") is None


def test_what_is_set_aside_counts_no_more(storage: Storage) -> None:
    fill(storage, "step-1", "one")
    storage.set_aside("step-1", "damaged-step-1")
    assert storage.read_json("step-1/manifest.json") is None


def test_removed_is_removed_and_twice_is_fine(storage: Storage) -> None:
    fill(storage, "step-1", "one")
    storage.remove("step-1")
    storage.remove("step-1")
    assert storage.folders() == []


def test_a_writable_storage_passes_and_keeps_nothing(storage: Storage) -> None:
    storage.check_writable()
    assert storage.fs.ls(f"{storage.root}/.finetune") == []


def test_two_jobs_may_ask_whether_it_is_writable_at_once(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    write = storage.fs.pipe_file
    others = [lambda: None, storage.check_writable]

    def and_another(path: str, value: bytes) -> None:
        write(path, value)
        others.pop()()

    monkeypatch.setattr(storage.fs, "pipe_file", and_another)
    storage.check_writable()
    assert others == []


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, Reason.STORAGE_FULL),
        (errno.EROFS, Reason.STORAGE_UNAVAILABLE),
        (errno.EACCES, Reason.STORAGE_UNAVAILABLE),
    ],
)
def test_a_storage_that_cannot_be_written_says_why(storage: Storage, monkeypatch: pytest.MonkeyPatch, number: int, reason: Reason) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "refused by the test")

    monkeypatch.setattr(storage.fs, "pipe_file", refuse)
    with pytest.raises(JobError) as caught:
        storage.check_writable()
    assert caught.value.reason == reason
    assert storage.uri in caught.value.message


def test_two_jobs_write_the_same_file_at_once(tmp_path: Path) -> None:
    """Each has what it wrote in place for a moment, neither fails, and nothing half written is ever seen."""
    root = Storage(LocalFileSystem(), str(tmp_path / "root"), f"file://{tmp_path}/root")
    value, failures = {"answers": ["a" * 100] * 500}, list[Exception]()

    def write_often() -> None:
        try:
            for _ in range(20):
                root.write_json("answers/batch.json", value)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write_often) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert root.read_json("answers/batch.json") in (value, None) or not root.exists("answers/batch.json")
    assert failures == []
    assert root.read_json("answers/batch.json") == value
    assert [path.name for path in (tmp_path / "root" / "answers").iterdir()] == ["batch.json"]


def test_a_full_disk_is_told_from_a_full_volume(tmp_path: Path) -> None:
    """What goes into a bucket is put together on this machine, which is then what is full."""
    full = OSError(errno.ENOSPC, "No space left on device")
    for storage, words in (
        (Storage(LocalFileSystem(), str(tmp_path), "pvc://models/bot"), "pvc://models/bot/adapter: no space is left"),
        (
            Storage(MemoryFileSystem(), "/bucket/root", "s3://bucket/root"),
            f"{tempfile.gettempdir()} of this machine, by way of which s3://bucket/root/adapter goes: no space is left",
        ),
    ):
        with pytest.raises(JobError) as caught, storage.new_folder("adapter"):
            raise full
        assert (caught.value.reason, caught.value.message) == (Reason.STORAGE_FULL, words)


def test_a_shelf_keeps_the_last_of_each_name() -> None:
    with Shelf() as shelf:
        for name, content in ((b"a", b"one"), (b"b", b""), (b"a", b"three"), (b"c", b"four")):
            shelf.put(name, content)
        assert [shelf.get(name) for name in (b"a", b"b", b"c", b"d")] == [b"three", b"", b"four", None]
        assert b"b" in shelf
        assert b"d" not in shelf


def test_a_shelf_that_is_full_says_where() -> None:
    """/dev/full takes nothing, as a full disk does."""
    with Shelf() as shelf, open("/dev/full", "r+b", buffering=0) as full:  # noqa: PTH123
        shelf._file = full
        with pytest.raises(JobError, match=r"of the head, not output\.storage: no space is left") as caught:
            shelf.put(b"a", b"one")
    assert caught.value.reason == Reason.STORAGE_FULL


def test_a_text_is_replaced_whole_and_found_by_its_name(storage: Storage) -> None:
    assert storage.read_text("answers/a.jsonl") is None
    assert storage.files("answers") == []
    storage.fs.makedirs(storage.location("answers/b").path, exist_ok=True)  # arrow's local files ask for what a bucket does not
    storage.write_text("answers/a.jsonl", '{"text": "één"}\n')
    storage.write_text("answers/a.jsonl", '{"text": "zwei"}\n')
    storage.write_text("answers/b/c.jsonl", "")
    assert storage.read_text("answers/a.jsonl") == '{"text": "zwei"}\n'
    assert storage.files("answers") == ["a.jsonl"]
    assert storage.folders("answers") == ["b"]
