"""output.storage: one folder, on a file system or in an object store, in which a name is complete or not there.

A folder is built aside. On a file system it is flushed to disk and renamed; in an object store its manifest is uploaded last, and a folder
without its manifest counts for nothing.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location

MANIFEST = "manifest.json"
ABANDONED_SECONDS = 7 * 24 * 3600.0
"""Age at which what is half made under a shared name is taken for a killed process's."""


@dataclass(frozen=True)
class Storage:
    """Files below one root. Names are relative, with '/'. Every method raises JobError(StorageFull | StorageUnavailable)."""

    fs: AbstractFileSystem
    root: str
    uri: str
    """The root as the job names it."""

    @property
    def is_local(self) -> bool:
        """Whether the root is on a file system of this machine, a mounted volume included."""
        return isinstance(self.fs, LocalFileSystem)

    def at(self, name: str) -> "Storage":
        """The storage below a folder."""
        return Storage(self.fs, self._path(name), self.locate(name))

    def location(self, name: str) -> Location:
        """A name as the other modules take it."""
        return Location(self.fs, self._path(name), self.locate(name))

    def locate(self, name: str) -> str:
        """The URI of a name."""
        return f"{self.uri.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        with storage_errors(self.locate(name)):
            return bool(self.fs.exists(self._path(name)))

    def folders(self, name: str = "") -> list[str]:
        """Names of the folders directly below, sorted."""
        with storage_errors(self.locate(name)):
            path = self._path(name)
            self.fs.invalidate_cache()
            if not self.fs.exists(path):
                return []
            return sorted(PurePosixPath(entry["name"]).name for entry in self.fs.ls(path, detail=True) if entry["type"] == "directory")

    def read_json(self, name: str) -> Any | None:  # noqa: ANN401 - any JSON
        """The JSON value of a file; None where the file is absent or not JSON, or nested deeper than can be read."""
        with storage_errors(self.locate(name)):
            try:
                return json.loads(self.fs.cat_file(self._path(name)))
            except (FileNotFoundError, ValueError, RecursionError):
                return None

    def write_json(self, name: str, value: object) -> None:
        """Replace a file whole: a reader sees the old one or the new one."""
        self.write_text(name, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")

    def read_text(self, name: str) -> str | None:
        """A file of text; None where it is absent. Raises ValueError where it is not UTF-8."""
        with storage_errors(self.locate(name)):
            try:
                return str(self.fs.cat_file(self._path(name)), "utf-8")
            except FileNotFoundError:
                return None

    def write_text(self, name: str, text: str) -> None:
        """Replace a file whole: a reader sees the old one or the new one."""
        with storage_errors(self.locate(name)):
            if not self.is_local:
                self.fs.pipe_file(self._path(name), text.encode())
                return
            target = Path(self._path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")  # another job may be writing the same
            try:
                aside.write_text(text, encoding="utf-8")
                _flush(aside)
                aside.replace(target)
            finally:
                aside.unlink(missing_ok=True)
            _flush(target.parent)

    def files(self, name: str = "") -> list[str]:
        """Names of the files directly below, sorted; those that are being written left out."""
        with storage_errors(self.locate(name)):
            path = self._path(name)
            self.fs.invalidate_cache()
            if not self.fs.exists(path):
                return []
            found = (PurePosixPath(entry["name"]).name for entry in self.fs.ls(path, detail=True) if entry["type"] == "file")
            return sorted(each for each in found if not each.startswith("."))

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """An empty folder on this machine to fill, `manifest.json` among its files; on leaving, it becomes the folder `name`.

        What was there before under this name stays until the new one is complete (on a file system), or is incomplete from the moment
        that the new one begins to be uploaded (in an object store). An exception leaves what was there before.
        """
        with storage_errors(self.locate(name)):
            if self.is_local:
                target = Path(self._path(name))
                for left in target.parent.glob(f".{target.name}.*partial"):  # by one that was killed, or should have been
                    shutil.rmtree(left, ignore_errors=True)
                # A name of its own: a worker that was given up but lives on must not put this folder in place half filled.
                aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
                make_folder(aside)
                try:
                    yield aside
                    _let_others_read(aside)
                    _flush_tree(aside)
                    _swap(aside, target)
                except BaseException:
                    shutil.rmtree(aside, ignore_errors=True)
                    raise
            else:
                with tempfile.TemporaryDirectory() as aside_name:
                    yield Path(aside_name)
                    self._upload(Path(aside_name), name)

    @contextmanager
    def shared_folder(self, name: str, owner: str = "") -> Iterator[Path]:
        """As new_folder, where several may be making the same folder at this moment: the first that is complete stays, whoever reads it.

        What the same owner has left half made goes at once, whatever else a killed process left after ABANDONED_SECONDS.
        """
        with storage_errors(self.locate(name)):
            if self.is_local:
                target = Path(self._path(name))
                own = f".{target.name}.{hashlib.sha256(owner.encode()).hexdigest()[:8]}-" if owner else f".{target.name}."
                for left in target.parent.glob(f".{target.name}.*partial"):
                    with suppress(FileNotFoundError):  # its owner has put it in its place
                        is_own = bool(owner) and left.name.startswith(own)
                        if is_own or time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                            shutil.rmtree(left, ignore_errors=True)
                aside = target.with_name(f"{own}{uuid.uuid4().hex[:8]}.partial")
                aside.mkdir(parents=True)
                try:
                    yield aside
                    _let_others_read(aside)
                    _flush_tree(aside)
                    _rename_if_free(aside, target)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
            else:
                with tempfile.TemporaryDirectory() as aside_name:
                    yield Path(aside_name)
                    if not self.exists(f"{name}/{MANIFEST}"):
                        self._upload(Path(aside_name), name)

    def making(self, name: str, token: str) -> "Making":
        """A folder that several processes, which may be on several machines, make together. The token is the same for all of them."""
        return Making(self, name, token)

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """The folder on this machine, to read: itself, or a copy that is gone afterwards."""
        with storage_errors(self.locate(name)):
            if self.is_local:
                yield Path(self._path(name))
            else:
                with tempfile.TemporaryDirectory() as copy:
                    self.fs.get(self._path(name).rstrip("/") + "/", copy + "/", recursive=True)
                    yield Path(copy)

    def move(self, name: str, new_name: str) -> None:
        """Have a folder under another name, in place of what was there; its manifest goes last."""
        with storage_errors(self.locate(name)):
            if self.is_local:
                shutil.rmtree(self._path(new_name), ignore_errors=True)
                Path(self._path(name)).replace(self._path(new_name))
            else:
                with self.folder(name) as source:
                    self._upload(source, new_name)
                self.remove(name)

    def set_aside(self, name: str, new_name: str) -> None:
        """Rename a folder so that it counts no more. In an object store only its manifest is renamed, which comes to the same."""
        with storage_errors(self.locate(name)):
            if self.is_local:
                self.move(name, new_name)
            elif self.fs.exists(self._path(f"{name}/{MANIFEST}")):
                self.fs.mv(self._path(f"{name}/{MANIFEST}"), self._path(f"{name}/{MANIFEST}.damaged"))

    def remove(self, name: str) -> None:
        """Remove a folder, its manifest first; absent is fine."""
        with storage_errors(self.locate(name)):
            if self.fs.exists(self._path(f"{name}/{MANIFEST}")):
                self.fs.rm_file(self._path(f"{name}/{MANIFEST}"))
            if self.fs.exists(self._path(name)):
                self.fs.rm(self._path(name), recursive=True)

    def remove_abandoned(self, name: str) -> None:
        """Remove what killed processes have left half made in a folder, whatever it was to become, after ABANDONED_SECONDS."""
        if not self.is_local:
            return  # what is put together for an object store goes with its machine
        with storage_errors(self.locate(name)):
            for left in Path(self._path(name)).glob(".*.partial"):
                with suppress(FileNotFoundError):  # its owner has put it in its place
                    if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()

    def check_writable(self) -> None:
        """Write a small file, read it, remove it."""
        name = f".finetune/.writable-{uuid.uuid4().hex[:8]}"  # other jobs may ask at the same moment
        with storage_errors(self.uri):
            path = self._path(name)
            self.fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            self.fs.pipe_file(path, b"ok")
            if self.fs.cat_file(path) != b"ok":
                raise OSError(errno.EIO, "what was written is not what is read")
            self.fs.rm_file(path)

    def _upload(self, source: Path, name: str) -> None:
        manifest = self._path(f"{name}/{MANIFEST}")
        if self.fs.exists(manifest):
            self.fs.rm_file(manifest)
        files = sorted(path for path in source.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == MANIFEST and path.parent == source):
            self.fs.put_file(str(path), self._path(f"{name}/{path.relative_to(source).as_posix()}"))

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}".rstrip("/")


@dataclass(frozen=True)
class Making:
    """A folder that is being made by several processes: all write their parts, then one completes it. Until then it counts for nothing."""

    storage: Storage
    name: str
    token: str

    def begin(self) -> None:
        """Called by the one that completes, before any part is written."""
        with storage_errors(self.storage.locate(self.name)):
            if self.storage.is_local:
                for left in self._target.parent.glob(f".{self._target.name}.*partial"):
                    shutil.rmtree(left, ignore_errors=True)
                make_folder(self._aside)
            elif self.storage.exists(f"{self.name}/{MANIFEST}"):
                self.storage.fs.rm_file(self.storage.location(f"{self.name}/{MANIFEST}").path)

    @contextmanager
    def part(self) -> Iterator[Path]:
        """A folder on this machine to write one's own files in; their names must be no other's."""
        with storage_errors(self.storage.locate(self.name)):
            if self.storage.is_local:
                self._aside.mkdir(parents=True, exist_ok=True)  # a network volume may not show it yet
                with tempfile.TemporaryDirectory(dir=self._aside) as own_name:
                    own = Path(own_name)
                    yield own
                    _flush_tree(own)
                    for path in sorted(own.iterdir()):
                        path.replace(self._aside / path.name)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    yield Path(folder)
                    self.storage._upload(Path(folder), self.name)

    def read_json(self, name: str) -> Any:  # noqa: ANN401 - any JSON
        """The JSON value of a file that one of the processes has written. Raises JobError (StorageUnavailable) where it is not there."""
        with storage_errors(self.storage.locate(self.name)):
            if self.storage.is_local:
                return json.loads((self._aside / name).read_bytes())
            return json.loads(self.storage.fs.cat_file(self.storage.location(f"{self.name}/{name}").path))

    def complete(self, fill: Callable[[Path], None]) -> None:
        """Put the folder in its place, with what `fill` adds: its manifest."""
        with storage_errors(self.storage.locate(self.name)):
            if self.storage.is_local:
                fill(self._aside)
                _let_others_read(self._aside)
                _flush_tree(self._aside)
                _swap(self._aside, self._target)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    fill(Path(folder))
                    self.storage._upload(Path(folder), self.name)

    @property
    def _target(self) -> Path:
        return Path(self.storage.location(self.name).path)

    @property
    def _aside(self) -> Path:
        return self._target.with_name(f".{self._target.name}.{self.token}.partial")


def storage_at(location: Location) -> Storage:
    """The storage whose root is a place."""
    return Storage(location.filesystem, location.path, location.uri)


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn what the operating system or the object store says into JobError(StorageFull | StorageUnavailable) naming the place."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        if is_full(error):
            # A bucket has no end; what goes there or comes from there is put together on this machine.
            place = f"{tempfile.gettempdir()} of this machine, by way of which {where} goes" if where.startswith("s3://") else where
            raise JobError(Reason.STORAGE_FULL, f"{place}: no space is left") from error
        if isinstance(error, OSError):
            raise JobError(Reason.STORAGE_UNAVAILABLE, f"{where}: {error.strerror or error}") from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk or the quota is full; safetensors says so in words only."""
    words = str(error)
    return (
        (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in words
        or "Disk quota exceeded" in words
    )


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, each on the disk before going on: a power cut must not lose what is below."""
    missing = [folder, *(parent for parent in folder.parents if not parent.exists())]
    folder.mkdir(parents=True)
    for made in missing:
        _flush(made.parent)


def _swap(aside: Path, target: Path) -> None:
    """Put a complete folder in another's place. Between the two renames neither is there; a reader tries the manifest again."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    aside.replace(target)
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _rename_if_free(aside: Path, target: Path) -> None:
    """Put a complete folder in its place, unless another complete one is there."""
    if target.exists() and not (target / MANIFEST).exists():
        shutil.rmtree(target, ignore_errors=True)
    try:
        aside.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _flush(target.parent)


def _let_others_read(folder: Path) -> None:
    """Give files the mode of any ordinary file: safetensors writes weights for its own user alone, and another one serves the model."""
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # some network volumes keep no modes
                path.chmod(0o644)


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    """Have a file's or a folder's content on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
