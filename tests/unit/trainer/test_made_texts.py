"""What is read out of the texts of models, which say it in many ways."""

import time

import pytest

from finetune_trainer.made_data.texts import Pair, filled, pairs_in, points_in


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "- one\n* two\n+ three\n\u2022 four\n\u2013 five\n1. six\n(7) seven\n8) eight",
            ["one", "two", "three", "four", "five", "six", "seven", "eight"],
        ),
        ("**bold** and `code` [3]\n---\n123\n\n  ", ["bold and code"]),
        ("same\n- same\nother", ["same", "other"]),
        ("x" * 1001 + "\ny", ["y"]),
        ("\n".join(f"p{number}" for number in range(90)), [f"p{number}" for number in range(64)]),
        ("3.5 euros\n-5 degrees", ["3.5 euros", "-5 degrees"]),
    ],
)
def test_points_are_read_however_they_are_listed(text: str, found: list[str]) -> None:
    assert points_in(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Question: a?\nAnswer: b.", [Pair("a?", "b.")]),
        ("Sure!\n\n**Question 1:** a?\n**Answer 1:** b\nc\n\nQ: d\nA: e", [Pair("a?", "b\nc"), Pair("d", "e")]),
        ("1) Question: a?\n   Answer: b\n2) Question: d?\n   Answer: e", [Pair("a?", "b"), Pair("d?", "e")]),
        ("Question: a?\nQuestion: b?\nAnswer: c", [Pair("b?", "c")]),
        ("Answer: c\nQuestion: a?", []),
        ("Question:\nAnswer: c\nQuite a lot: d\nAnd so: e", []),
        ("", []),
    ],
)
def test_pairs_are_read_however_they_are_marked(text: str, found: list[Pair]) -> None:
    assert pairs_in(text) == found


def test_values_are_put_in_once() -> None:
    assert filled("{a}{b} {c} {} {{a}}", {"a": "{b}", "b": "\\1"}) == "{b}\\1 {c} {} {{b}}"


@pytest.mark.parametrize("line", ["q" + " " * 200_000 + "x", "-" * 200_000 + "x", "q:" + "*" * 200_000, "1." * 100_000, "* " * 100_000])
def test_what_a_generator_writes_takes_no_long_time(line: str) -> None:
    begun = time.process_time()
    pairs_in(f"Question: a\n{line}\nAnswer: b")
    points_in(line)
    assert time.process_time() - begun < 5
