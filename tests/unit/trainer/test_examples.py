import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from finetune_api.reasons import Reason
from finetune_trainer.data.examples import MANIFEST, Examples, Prepared, digest_of, join, open_prepared, read_manifest, write_prepared
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location


def split(*documents: list[int]) -> Examples:
    return join([(np.array(tokens, np.int32), np.array([token % 2 == 1 for token in tokens])) for tokens in documents])


def prepared(test: Examples | None = None) -> Prepared:
    splits = {"train": split([1, 2, 3], [4]), "validation": split([5, 7])} | ({"test": test} if test else {})
    return Prepared(splits["train"], splits["validation"], test, rejected=2, digest=digest_of(splits))


def local(path: Path) -> Location:
    return Location(fsspec.filesystem("file"), str(path), f"file://{path}")


def in_memory(name: str) -> Location:
    return Location(fsspec.filesystem("memory"), f"/{name}", f"memory://{name}")


def assert_same(first: Prepared, second: Prepared) -> None:
    assert (first.digest, first.rejected, list(first.splits())) == (second.digest, second.rejected, list(second.splits()))
    for one, other in zip(first.splits().values(), second.splits().values(), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.labelled, other.labelled)
        np.testing.assert_array_equal(one.offsets, other.offsets)


@pytest.mark.parametrize("test", [None, split([9, 9, 8])])
def test_what_is_written_is_read_and_mapped(tmp_path: Path, test: Examples | None) -> None:
    write_prepared(prepared(test), local(tmp_path / "prepared"))
    read = open_prepared(local(tmp_path / "prepared"), tmp_path / "cache")
    assert_same(read, prepared(test))
    assert isinstance(read.train.tokens, np.memmap)
    assert digest_of(read.splits()) == read.digest


def test_a_folder_elsewhere_is_copied_once(tmp_path: Path) -> None:
    folder = in_memory(tmp_path.name)
    write_prepared(prepared(), folder)
    assert_same(open_prepared(folder, tmp_path), prepared())
    folder.filesystem.rm(f"{folder.path}/train-tokens.npy")
    assert_same(open_prepared(folder, tmp_path), prepared())


def test_a_folder_without_its_manifest_is_not_there(tmp_path: Path) -> None:
    write_prepared(prepared(), local(tmp_path))
    (tmp_path / MANIFEST).unlink()
    assert read_manifest(local(tmp_path)) is None
    with pytest.raises(JobError) as caught:
        open_prepared(local(tmp_path), tmp_path)
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE


def test_the_arrays_are_on_the_disk_before_the_manifest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    write_prepared(prepared(), local(tmp_path))
    assert set(flushed) == {path.stat().st_ino for path in tmp_path.iterdir()}
    assert flushed[-1] == (tmp_path / MANIFEST).stat().st_ino


def test_an_array_that_is_empty_is_told(tmp_path: Path) -> None:
    write_prepared(prepared(), local(tmp_path))
    (tmp_path / "train-tokens.npy").write_bytes(b"")
    with pytest.raises(JobError, match="cannot be read") as caught:
        open_prepared(local(tmp_path), tmp_path / "cache")
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE


def test_a_damaged_array_is_told(tmp_path: Path) -> None:
    write_prepared(prepared(), local(tmp_path))
    (tmp_path / "train-tokens.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(JobError, match="cannot be read") as caught:
        open_prepared(local(tmp_path), tmp_path)
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE


@pytest.mark.parametrize(
    "other",
    [
        {"train": split([1, 2, 5], [4])},
        {"train": split([1, 2], [3, 4])},
        {"validation": split([1, 2, 3], [4])},
        {"train": Examples(split([1, 2, 3], [4]).tokens, np.zeros(4, np.bool_), split([1, 2, 3], [4]).offsets)},
    ],
    ids=["token", "boundary", "split", "label"],
)
def test_any_difference_makes_another_digest(other: dict[str, Examples]) -> None:
    assert digest_of(other) != digest_of({"train": split([1, 2, 3], [4])})


def test_examples_are_taken_in_the_order_asked_for() -> None:
    taken = split([1, 2], [3], [4, 5, 6]).take([2, 0])
    assert taken.tokens.tolist() == [4, 5, 6, 1, 2]
    assert taken.offsets.tolist() == [0, 3, 5]
    assert taken.lengths().tolist() == [3, 2]


def test_an_examples_first_token_is_no_label() -> None:
    """[1, 2, 3] has the odd tokens labelled, of which 1 is never predicted."""
    assert split([1, 2, 3], [5], [2, 3, 5]).label_counts().tolist() == [1, 0, 2]
