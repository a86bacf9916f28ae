"""Every file that cannot be read, and every row, told by file, line and what is wrong."""

import json
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from finetune_api.reasons import Reason
from finetune_trainer.data import rows as rows_module
from finetune_trainer.data.rows import Fault, Row, read_rows
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Location


def location(path: Path) -> Location:
    return Location(fsspec.filesystem("file"), str(path), f"pvc://data/{path.name}")


def read(path: Path) -> list[Row | Fault]:
    return list(read_rows(location(path)))


def read_bytes(tmp_path: Path, name: str, content: bytes) -> list[str]:
    """The rows as text: the columns of a good one, the fault of a bad one."""
    (tmp_path / name).write_bytes(content)
    return [str(row) if isinstance(row, Fault) else f"{row.place.number}: {json.dumps(row.columns)}" for row in read(tmp_path / name)]


def refused(tmp_path: Path, name: str, content: bytes) -> str:
    with pytest.raises(JobError) as caught:
        read_bytes(tmp_path, name, content)
    assert caught.value.reason == Reason.DATASET_INVALID
    return caught.value.message


def test_jsonl(tmp_path: Path) -> None:
    content = b'{"text": "a"}\r\n\n  \n{"text": "\xc3\xa4", "n": null}'
    assert read_bytes(tmp_path, "a.jsonl", content) == ['1: {"text": "a"}', '4: {"text": "\\u00e4", "n": null}']


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b'{"text": "b"', "the row is not JSON: Expecting ',' delimiter at column 13"),
        (b"hello", "the row is not JSON: Expecting value at column 1"),
        (b'{"text": "\xff"}', "the row is not UTF-8 (byte 11)"),
        (b'["a"]', "the row is an array, not an object"),
        (b'"a"', "the row is a string, not an object"),
        (b"1", "the row is a number, not an object"),
        (b"true", "the row is a truth value, not an object"),
        (b"null", "the row is null, not an object"),
        (b"[" * 100_000, "the row is nested too deeply"),
        (b'{"n": ' + b"1" * 10_000 + b"}", "the row holds a number of thousands of digits"),
        (b'{"text": "\\ud83d"}', "the row holds half a character (an unpaired \\ud800 to \\udfff)"),
    ],
    ids=["cut off", "not json", "not utf-8", "array", "string", "number", "boolean", "null", "nested", "digits", "half a character"],
)
def test_a_bad_line_is_told_and_the_next_is_read(tmp_path: Path, row: bytes, problem: str) -> None:
    lines = read_bytes(tmp_path, "a.jsonl", b'{"text": "a"}\n' + row + b'\n{"text": "c"}\n')
    assert lines == ['1: {"text": "a"}', f"pvc://data/a.jsonl, line 2: {problem}", '3: {"text": "c"}']


def test_a_line_that_never_ends_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "ROW_BYTES", 1 << 20)
    content = b'{"text": "' + b"x" * (3 << 20) + b'"}\n{"text": "b"}\n'
    assert read_bytes(tmp_path, "a.jsonl", content) == ["pvc://data/a.jsonl, line 1: the row is longer than 1 MiB", '2: {"text": "b"}']


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "a"}') == ['1: {"text": "a"}']
    assert read_bytes(tmp_path, "a.csv", b"\xef\xbb\xbftext\na\n") == ['2: {"text": "a"}']


def test_json(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "a.json", b'[{"text": "a"},\n {"text": "b"}, 3]') == [
        '1: {"text": "a"}',
        '2: {"text": "b"}',
        "pvc://data/a.json, row 3: the row is a number, not an object",
    ]


def test_json_that_is_jsonl_is_read_as_such(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "a.json", b'{"text": "a"}\n{"text": "b"}\n') == ['1: {"text": "a"}', '2: {"text": "b"}']


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"},\n{"text": }]', "pvc://data/a.json, line 2: the file is not JSON: Expecting value at column 10"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', "pvc://data/a.json, line 2: the file is not UTF-8 (byte 27)"),
        (b'{"rows": []}', "pvc://data/a.json holds an object, not an array of objects"),
        (b"[" * 100_000, "pvc://data/a.json, line 1: the file is nested too deeply"),
        (b"[]", "pvc://data/a.json has no rows"),
        (b"", "pvc://data/a.json has no rows"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    assert refused(tmp_path, "a.json", content) == message


def test_csv(tmp_path: Path) -> None:
    """A quoted value may hold line breaks; the row's line is its first."""
    lines = read_bytes(tmp_path, "a.csv", b'prompt,completion\nhi,"a\nb"\n\n"x, y",z\n')
    assert lines == ['2: {"prompt": "hi", "completion": "a\\nb"}', '5: {"prompt": "x, y", "completion": "z"}']


def test_bad_csv_rows(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "a.csv", b"prompt,completion\na\nb,c,d\n\xff,e\nf,g\n") == [
        "pvc://data/a.csv, line 2: the row has 1 values, the header 2 columns",
        "pvc://data/a.csv, line 3: the row has 3 values, the header 2 columns",
        "pvc://data/a.csv, line 4: the row is not UTF-8",
        '5: {"prompt": "f", "completion": "g"}',
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "pvc://data/a.csv has no rows"),
        (b"prompt,completion\n", "pvc://data/a.csv has no rows"),
        (b"prompt,prompt\na,b\n", "pvc://data/a.csv, line 1: a column's name is empty or stands twice: prompt, prompt"),
        (b'text\na\n"b', "pvc://data/a.csv, line 3: the row is not CSV: unexpected end of data"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    assert refused(tmp_path, "a.csv", content) == message


def test_a_line_of_csv_without_an_end_is_not_read_to_it(tmp_path: Path) -> None:
    """64 MiB that are no CSV, though they are called so: a row's 16 MiB are held, in some copies, not all of it."""
    content = b"text\nfirst\n" + b"a" * (64 << 20)
    tracemalloc.start()
    message = refused(tmp_path, "a.csv", content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message == "pvc://data/a.csv, line 3: the row is not CSV: a line longer than 16 MiB"
    assert peak < 60 << 20


def test_parquet(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "a"}], [{"role": "user", "content": None}]]
    parquet.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert isinstance(first, Row)
    assert first.columns == {"messages": messages[0]}
    assert str(second.place) == "pvc://data/a.parquet, row 2"


def test_parquet_that_is_none(tmp_path: Path) -> None:
    assert refused(tmp_path, "a.parquet", b"hello").startswith(
        "pvc://data/a.parquet is not a parquet file that can be read (after row 0): "
    )


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [f"text {number}" for number in range(5000)]}), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[1000:3000] = b"\xff" * 2000
    assert "a.parquet is not a parquet file that can be read" in refused(tmp_path, "a.parquet", bytes(content))


def test_parquet_whose_text_is_none(tmp_path: Path) -> None:
    column = pa.array([b"a", b"\xff"], pa.binary()).view(pa.utf8())
    parquet.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
    assert "not a parquet file" in refused(tmp_path, "a.parquet", (tmp_path / "b.parquet").read_bytes())


def test_a_whole_pair_of_escapes_is_one_character(tmp_path: Path) -> None:
    row = read_bytes(tmp_path, "a.jsonl", b'{"text": "\\ud83d\\ude00"}')
    assert json.loads(row[0].removeprefix("1: ")) == {"text": "\U0001f600"}


def test_half_a_character_in_json(tmp_path: Path) -> None:
    assert "row 1: the row holds half a character" in read_bytes(tmp_path, "a.json", b'[{"text": "\\ude00"}]')[0]


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "part").mkdir(parents=True)
    for name, text in (("b.jsonl", "2"), ("part/c.jsonl", "3"), ("a.jsonl", "1"), (".hidden.jsonl", "0"), ("README.md", "no data")):
        (folder / name).write_text(json.dumps({"text": text}))
    assert [row.columns["text"] for row in read(folder) if isinstance(row, Row)] == ["1", "2", "3"]
    assert [row.place.file for row in read(folder)][2] == "pvc://data/set/part/c.jsonl"


def test_a_folder_of_several_forms_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.csv").write_text("text\na\n")
    with pytest.raises(JobError, match=r"holds files of several forms \(.csv, .jsonl\)"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["nothing.jsonl", "no/such/folder"])
def test_what_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(JobError, match="does not exist") as caught:
        read(tmp_path / name)
    assert caught.value.reason == Reason.DATASET_NOT_FOUND


def test_a_file_of_another_form(tmp_path: Path) -> None:
    assert refused(tmp_path, "a.xlsx", b"PK") == "pvc://data/a.xlsx is no file that ends in .jsonl, .json, .csv, .parquet"


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(JobError, match=r"pvc://data/empty holds no file that ends in \.jsonl"):
        read(tmp_path / "empty")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}')
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(JobError, match="a symbolic link leads out") as caught:
        read(tmp_path / "set")
    assert caught.value.reason == Reason.INVALID_SPEC
