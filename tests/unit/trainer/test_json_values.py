"""An array read piece by piece is what json makes of the whole."""

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data import json_values
from finetune_trainer.data.json_values import BadJsonError, elements, parsed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def read(content: bytes, piece: int, limit: int = 1 << 20) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_READ", piece)
        return list(elements(io.BytesIO(content), limit))


@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 9))
def test_the_elements_are_those_of_json(values: list[Any], indent: int | None, ascii_only: bool, piece: int) -> None:
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    if ascii_only or b"\xed" not in content:
        found = read(content, piece)
        assert [value for value, _ in found] == values
        assert [json.loads(text) for _, text in found] == values


def outcome_of_json(text: str) -> tuple[int, int] | Any:
    """The value, or the line and column that json names."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return error.lineno, error.colno


@given(st.lists(VALUES, min_size=1, max_size=4), st.integers(0, 200), st.sampled_from(["", "x", ",", "]", "\n"]), st.integers(1, 9))
def test_what_is_wrong_is_told_where_json_finds_it(values: list[Any], place: int, damage: str, piece: int) -> None:
    text = json.dumps(values, indent=1)
    place = 1 + place % (len(text) - 1)
    damaged = text[:place] + damage + text[place + 1 :]
    try:
        found: Any = [value for value, _ in read(damaged.encode(), piece)]
    except BadJsonError as error:
        found = error.line, int(str(error).rpartition(" ")[2])
    assert found == outcome_of_json(damaged)


@pytest.mark.parametrize("piece", [4, 5, 1000])
def test_a_byte_order_mark_and_letters_of_several_bytes(piece: int) -> None:
    assert [value for value, _ in read(b"\xef\xbb\xbf" + '["ä😀", "é"]'.encode(), piece)] == ["ä😀", "é"]


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_bytes_that_are_no_text_are_told_by_their_number(piece: int) -> None:
    with pytest.raises(BadJsonError) as caught:
        read(b'["\xc3\xa4",\n"\xff"]', piece)
    assert (caught.value.line, str(caught.value)) == (2, "is not UTF-8 (byte 9)")


def test_no_more_is_held_than_an_element_and_what_is_read_with_it() -> None:
    class Endless(io.RawIOBase):
        """An array whose end is never reached."""

        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += 1
            return b'{"text": "abc"},' if self.given > 1 else b"["

    stream = Endless()
    found = elements(stream, 1 << 20)
    for number in range(1, 2000):
        assert next(found) == ({"text": "abc"}, '{"text": "abc"}')
        assert stream.given <= number + 2


def test_an_element_that_never_ends() -> None:
    with pytest.raises(BadJsonError, match="is not JSON: a value of more than 1 MiB, or one that is none: Unterminated string"):
        read(b'["' + b"x" * (3 << 20) + b'"]', 1 << 10)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [(b'[1,\n{"a": ' + b"1" * 10_000 + b"}]", 2, "holds a number of thousands of digits"), (b"[" * 100_000, 1, "is nested too deeply")],
)
def test_numbers_and_depths_that_python_refuses(content: bytes, line: int, problem: str) -> None:
    with pytest.raises(BadJsonError) as caught:
        read(content, 1 << 16)
    assert (caught.value.line, str(caught.value)) == (line, problem)


def test_a_single_value() -> None:
    assert parsed('\ufeff{"a": "ä"}'.encode()) == {"a": "ä"}
    with pytest.raises(BadJsonError, match="is not JSON: Extra data at column 1") as caught:
        parsed(b"{}\n{}")
    assert caught.value.line == 2
