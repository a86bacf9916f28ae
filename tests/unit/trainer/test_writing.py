import hashlib
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.format import open_memmap

from finetune_trainer.data import examples, writing
from finetune_trainer.data.writing import SplitWriter, digest_of, divide, examples_in, parts_of, token_quantiles, tokens_in

Documents = list[list[int]]


def write(folder: Path, split: str, documents: Documents) -> None:
    """The odd tokens are labelled."""
    with SplitWriter(folder, split) as writer:
        for document in documents:
            tokens = np.array(document, np.int32)
            writer.add(tokens, tokens % 2 == 1)


def read(folder: Path, split: str) -> Documents:
    tokens, labelled, offsets = (np.load(folder / f"{split}-{part}.npy") for part in ("tokens", "labelled", "offsets"))
    assert (labelled == (tokens % 2 == 1)).all()
    return [tokens[start:end].tolist() for start, end in itertools.pairwise(offsets)]


@pytest.mark.parametrize("documents", [[], [[1]], [[1, 2, 3], [4], [5, 6]], [[n] * (n % 7 + 1) for n in range(5000)]])
def test_numpy_reads_what_was_appended(tmp_path: Path, documents: Documents) -> None:
    write(tmp_path, "train", documents)
    assert read(tmp_path, "train") == documents
    assert (examples_in(tmp_path, "train"), tokens_in(tmp_path, "train")) == (len(documents), sum(map(len, documents)))
    types = {part: np.load(tmp_path / f"train-{part}.npy").dtype.str for part in ("tokens", "labelled", "offsets")}
    assert types == {"tokens": "<i4", "labelled": "|b1", "offsets": "<i8"}


def test_the_header_has_room_for_any_number(tmp_path: Path) -> None:
    """A terabyte of tokens by its header, a few bytes on the disk: the header is as long as an empty array's."""
    write(tmp_path, "train", [])
    empty = (tmp_path / "train-tokens.npy").stat().st_size
    large = open_memmap(tmp_path / "large.npy", mode="w+", dtype="<i4", shape=(2**38,))
    assert large.offset == empty


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.sampled_from([-1, 0, 1, 2])), max_size=30),
    st.integers(1, 20),
)
def test_a_division_keeps_every_examples_order(tmp_path_factory: pytest.TempPathFactory, drawn: list, block: int) -> None:
    folder = tmp_path_factory.mktemp("divided")
    write(folder, "all", [document for document, _ in drawn])
    into = {0: "train", 1: "validation", 2: "test"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "BLOCK", block)
        divide(folder, "all", np.array([side for _, side in drawn], np.int8), into)
    for side, split in into.items():
        assert read(folder, split) == [document for document, of in drawn if of == side]
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["test"] * 3 + ["train"] * 3 + ["validation"] * 3


@pytest.mark.parametrize(
    ("lengths", "quantiles"),
    [
        ([7], (7, 7, 7, 7)),
        ([1, 2, 3, 4], (1, 2, 4, 4)),
        ([5, 1, 9], (1, 5, 9, 9)),
        ([*range(100, 0, -1)], (1, 50, 95, 100)),
        ([3] * 19 + [50], (3, 3, 3, 50)),
    ],
)
def test_lengths_by_their_rank(tmp_path: Path, lengths: list[int], quantiles: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest rank: of 20 lengths 19 are 95 percent, of 4 all are."""
    monkeypatch.setattr(writing, "_READ", 3)
    write(tmp_path, "train", [[1] * length for length in lengths])
    assert tuple(token_quantiles(tmp_path, "train").values()) == quantiles
    assert list(token_quantiles(tmp_path, "train")) == ["min", "median", "p95", "max"]


def test_no_part_is_longer_than_a_block_or_one_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "BLOCK", 10)
    write(tmp_path, "train", [[1] * length for length in (3, 3, 3, 25, 1, 9, 10, 2)])
    assert [lengths.tolist() for _, _, lengths in parts_of(tmp_path, "train")] == [[3, 3, 3], [25], [1, 9], [10], [2]]


def test_the_digest_is_of_names_types_lengths_and_values(tmp_path: Path) -> None:
    """Written out by hand."""
    write(tmp_path, "train", [[1, 2], [3]])
    expected = b"train/tokens/<i4/3\n" + struct.pack("<3i", 1, 2, 3) + b"train/labelled/|b1/3\n" + b"\1\0\1"
    expected += b"train/offsets/<i8/3\n" + struct.pack("<3q", 0, 2, 3)
    assert digest_of(tmp_path, ["train"], 1) == f"sha256:{hashlib.sha256(expected).hexdigest()}"


@pytest.mark.parametrize(
    ("split", "documents", "group"),
    [("train", [[1, 2, 5], [4]], 1), ("train", [[1, 2], [3, 4]], 1), ("validation", [[1, 2, 3], [4]], 1), ("train", [[1, 2, 3], [4]], 2)],
    ids=["token", "boundary", "split", "group"],
)
def test_any_difference_makes_another_digest(tmp_path: Path, split: str, documents: Documents, group: int) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", "train", [[1, 2, 3], [4]])
    write(tmp_path, split, documents)
    assert digest_of(tmp_path, [split], group) != digest_of(tmp_path / "base", ["train"], 1)


def test_another_label_makes_another_digest(tmp_path: Path) -> None:
    write(tmp_path, "train", [[1, 2, 3]])
    write(tmp_path, "other", [[1, 2, 3]])
    before = digest_of(tmp_path, ["train"], 1)
    np.save(tmp_path / "train-labelled.npy", np.array([True, True, True]))
    assert digest_of(tmp_path, ["train"], 1) != before
