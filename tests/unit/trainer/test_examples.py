import json
from pathlib import Path

import fsspec
import numpy as np
import pytest

from finetune_api.reasons import Reason
from finetune_trainer.data import examples as examples_module
from finetune_trainer.data.examples import FORMAT, MANIFEST, Examples, Prepared, join, open_prepared, read_manifest
from finetune_trainer.data.writing import SplitWriter, write_manifest
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location


def split(*documents: list[int]) -> Examples:
    return join([(np.array(tokens, np.int32), np.array([token % 2 == 1 for token in tokens])) for tokens in documents])


def splits(test: Examples | None = None) -> dict[str, Examples]:
    return {"train": split([1, 2, 3], [4]), "validation": split([5, 7])} | ({"test": test} if test else {})


def write(folder: Path, whole: dict[str, Examples], group: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, examples in whole.items():
        with SplitWriter(folder, name) as writer:
            for index in range(len(examples)):
                writer.add(*examples.example(index))
    write_manifest(folder, list(whole), group, {"rejected": 2})
    return folder


def local(path: Path) -> Location:
    return Location(fsspec.filesystem("file"), str(path), f"file://{path}")


def in_memory(name: str) -> Location:
    return Location(fsspec.filesystem("memory"), f"/{name}", f"memory://{name}")


def assert_same(read: Prepared, whole: dict[str, Examples]) -> None:
    assert (read.rejected, list(read.splits())) == (2, list(whole))
    for one, other in zip(read.splits().values(), whole.values(), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.labelled, other.labelled)
        np.testing.assert_array_equal(one.offsets, other.offsets)


@pytest.mark.parametrize("test", [None, split([9, 9, 8])])
def test_what_is_written_is_read_and_mapped(tmp_path: Path, test: Examples | None) -> None:
    read = open_prepared(local(write(tmp_path / "prepared", splits(test))), tmp_path / "cache")
    assert_same(read, splits(test))
    assert isinstance(read.train.tokens, np.memmap)


def test_groups_are_kept(tmp_path: Path) -> None:
    read = open_prepared(local(write(tmp_path / "prepared", splits(split([1], [2])), group=2)), tmp_path / "cache")
    assert (read.train.group, read.train.groups) == (2, 1)


def test_a_folder_elsewhere_is_copied_once(tmp_path: Path) -> None:
    folder = in_memory(tmp_path.name)
    folder.filesystem.put(f"{write(tmp_path / 'prepared', splits())}/", f"{folder.path}/", recursive=True)
    assert_same(open_prepared(folder, tmp_path), splits())
    folder.filesystem.rm(f"{folder.path}/train-tokens.npy")
    assert_same(open_prepared(folder, tmp_path), splits())


def test_a_folder_without_its_manifest_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, splits())
    (tmp_path / MANIFEST).unlink()
    assert read_manifest(local(tmp_path)) is None
    with pytest.raises(JobError) as caught:
        open_prepared(local(tmp_path), tmp_path)
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE


def test_a_folder_of_another_form_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, splits())
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": FORMAT - 1}))
    assert read_manifest(local(tmp_path)) is None


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY"], ids=["empty", "damaged"])
def test_an_array_that_cannot_be_read_is_told(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, splits())
    (tmp_path / "train-tokens.npy").write_bytes(content)
    with pytest.raises(JobError, match="cannot be read") as caught:
        open_prepared(local(tmp_path), tmp_path / "cache")
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE


def test_examples_are_taken_in_the_order_asked_for() -> None:
    taken = split([1, 2], [3], [4, 5, 6]).take([2, 0])
    assert taken.tokens.tolist() == [4, 5, 6, 1, 2]
    assert taken.offsets.tolist() == [0, 3, 5]
    assert taken.lengths().tolist() == [3, 2]


def test_an_examples_first_token_is_no_label() -> None:
    """[1, 2, 3] has the odd tokens labelled, of which 1 is never predicted."""
    assert split([1, 2, 3], [5], [2, 3, 5]).label_counts().tolist() == [1, 0, 2]


@pytest.mark.parametrize("block", [1, 3, 4, 7])
def test_labels_are_counted_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(examples_module, "BLOCK", block)
    assert split([1, 2, 3], [5], [2, 3, 5], [7, 7]).label_counts().tolist() == [1, 0, 2, 1]
    assert split().label_counts().tolist() == []
