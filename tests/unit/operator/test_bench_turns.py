"""The benchmark's arithmetic, on figures worked out by hand."""

import math
from pathlib import Path

import pytest
from tests.bench.turns import Touch, Turn, answered, first_ends, percentile, turns_in


def turn(job: str, begin: float, end: float) -> Turn:
    return Turn(job, "event", begin, begin, end)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([15, 20, 35, 40, 50], 30, 20),  # the textbook's example of the nearest rank
        ([15, 20, 35, 40, 50], 40, 20),
        ([50, 15, 40, 20, 35], 50, 35),
        ([15, 20, 35, 40, 50], 100, 50),
        (list(range(1, 101)), 99, 99),
        ([7], 1, 7),
    ],
)
def test_percentile_is_that_of_the_nearest_rank(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_a_change_is_answered_by_the_first_turn_of_its_job_that_began_after_it() -> None:
    turns = [turn("a/x", 0.9, 1.2), turn("a/x", 3.0, 3.5), turn("a/x", 1.5, 1.75), turn("a/y", 1.1, 1.2)]
    assert answered([Touch("a/x", 1.0), Touch("a/x", 2.0)], turns) == [0.75, 1.5]
    assert answered([Touch("a/x", 4.0), Touch("a/z", 0.0)], turns) == [math.inf, math.inf]


def test_turns_are_read_as_they_were_written_but_for_a_line_that_is_not_whole(tmp_path: Path) -> None:
    written, file = [turn("a/x", 0.1, 0.25), Turn("b/y", "time", 0.5, 0.75, 1.0)], tmp_path / "turns"
    assert turns_in(file) == []
    file.write_text("".join(each.line() for each in written) + "a/x time 1.0 2.")
    assert turns_in(file) == written
    assert first_ends([turn("a/x", 3, 4), turn("a/x", 1, 2)]) == {"a/x": 2}
