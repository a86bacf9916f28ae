import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.reasons import Reason
from finetune_trainer.data.held_out import held_out
from finetune_trainer.errors import JobError


def counts(sides: np.ndarray) -> list[int]:
    return [int((sides == side).sum()) for side in range(3)]


def keys(*sizes: int) -> np.ndarray:
    """Groups of these sizes, their rows mixed."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes), dtype=np.uint64) * 7919, sizes))


@pytest.mark.parametrize(
    ("count", "fractions", "expected"),
    [
        (20, {1: 0.1}, [18, 2, 0]),
        (20, {1: 0.1, 2: 0.25}, [13, 2, 5]),
        (2, {1: 0.5}, [1, 1, 0]),
        (3, {1: 0.1, 2: 0.1}, [1, 1, 1]),
        (3, {1: 0.5, 2: 0.5}, [1, 1, 1]),
        (10, {1: 0.5, 2: 0.5}, [1, 5, 4]),
        (25, {2: 0.1}, [23, 0, 2]),
    ],
)
def test_so_many_are_held_out(count: int, fractions: dict[int, float], expected: list[int]) -> None:
    """Rounded to the nearest (25 / 10 to the even one), at least one on each side."""
    assert counts(held_out(count, fractions, 3)) == expected


def test_the_seed_chooses() -> None:
    one, again, other = (held_out(50, {1: 0.2}, seed).tolist() for seed in (1, 1, 2))
    assert one == again != other


def test_a_second_fraction_changes_nothing_of_the_first() -> None:
    alone, both = held_out(50, {1: 0.2}, 1), held_out(50, {1: 0.2, 2: 0.3}, 1)
    assert ((alone == 1) == (both == 1)).all()


def test_groups_stay_whole_and_meet_the_fraction_where_they_can() -> None:
    """Forty groups of five: a tenth is four groups, an eighth five."""
    grouped = keys(*[5] * 40)
    sides = held_out(200, {1: 0.1, 2: 0.125}, 1, grouped)
    assert counts(sides) == [155, 20, 25]
    assert all(len(set(sides[grouped == key].tolist())) == 1 for key in np.unique(grouped))


def test_the_order_of_the_rows_does_not_decide() -> None:
    grouped = keys(3, 1, 4, 1, 5, 9, 2, 6)
    first = dict(zip(grouped.tolist(), held_out(31, {1: 0.3}, 1, grouped).tolist(), strict=True))
    again = dict(zip(grouped[::-1].tolist(), held_out(31, {1: 0.3}, 1, grouped[::-1]).tolist(), strict=True))
    assert first == again


def test_a_group_that_is_too_large_is_passed_over() -> None:
    """A tenth of 109 is 11: three groups of three come nearest, whatever the seed, and the one of 100 never does."""
    grouped = keys(100, 3, 3, 3)
    for seed in range(20):
        assert counts(held_out(109, {1: 0.1}, seed, grouped))[1] == 9


def test_where_all_are_too_large_it_is_the_smallest() -> None:
    assert counts(held_out(90, {1: 0.1}, 1, keys(40, 20, 30))) == [70, 20, 0]


@settings(deadline=None)
@given(st.lists(st.integers(1, 8), min_size=3, max_size=30), st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.integers(0, 5))
def test_whatever_the_groups_every_side_has_some_and_none_is_divided(sizes: list[int], one: float, other: float, seed: int) -> None:
    grouped = keys(*sizes)
    sides = held_out(len(grouped), {1: one, 2: other}, seed, grouped)
    assert min(counts(sides)) > 0
    assert all(len(set(sides[grouped == key].tolist())) == 1 for key in np.unique(grouped))


@pytest.mark.parametrize(
    ("count", "fractions", "grouped", "problem"),
    [
        (1, {1: 0.1}, None, "one example is too few to hold some out for validation; set data.validation.source"),
        (
            2,
            {1: 0.1, 2: 0.1},
            None,
            "2 examples are too few to hold some out for validation and test; set data.validation.source and data.test.source",
        ),
        (9, {2: 0.1}, keys(9), "one value of data.groupBy is too few to hold some out for test; set data.test.source"),
        (
            9,
            {1: 0.1, 2: 0.1},
            keys(5, 4),
            "2 values of data.groupBy are too few to hold some out for validation and test; "
            "set data.validation.source and data.test.source",
        ),
    ],
)
def test_too_few(count: int, fractions: dict[int, float], grouped: np.ndarray | None, problem: str) -> None:
    with pytest.raises(JobError) as caught:
        held_out(count, fractions, 1, grouped)
    assert (caught.value.reason, caught.value.message) == (Reason.DATASET_INVALID, f"data.train: {problem}")
