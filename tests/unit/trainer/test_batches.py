import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.v1alpha1 import Training
from finetune_trainer.data.batches import micro_batches, pack, plan_batches, positions, rank_share
from finetune_trainer.data.examples import Examples, join
from finetune_trainer.data.tensors import Layout, collate

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def array(*lengths: int) -> np.ndarray:
    return np.array(lengths, dtype=np.int64)


def examples_of(*lengths: int) -> Examples:
    """Examples whose every token is labelled, so that one of length n has n - 1 labels."""
    return join([(np.arange(length, dtype=np.int32), np.ones(length, dtype=np.bool_)) for length in lengths])


def training(**values: object) -> Training:
    return Training.model_validate({"maxSequenceLength": 10, "globalBatchSize": 2, "epochs": 3} | values)


def test_packing_by_hand() -> None:
    """Best-fit decreasing into rows of 10: 7 and 6 open rows; 4 fits only beside 6; 3 fits beside 7; 2 opens a row, which takes 1 too."""
    assert pack(array(3, 7, 2, 6, 4, 1), 10) == ((1, 0), (3, 4), (2, 5))


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    """8 and 6 leave room for 2 and 4: the 2 goes where just 2 are left, so that the 4 still fits."""
    assert pack(array(8, 6, 4, 2), 10) == ((0, 3), (1, 2))


def test_an_example_longer_than_a_row_has_one_of_its_own() -> None:
    assert pack(array(12, 5, 5), 10) == ((0,), (1, 2))


@given(LENGTHS)
def test_every_example_is_packed_once_and_no_row_overflows(lengths: list[int]) -> None:
    rows = pack(array(*lengths), 40)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(sum(lengths[example] for example in row) <= 40 for row in rows)


@given(LENGTHS)
def test_no_two_rows_could_be_one(lengths: list[int]) -> None:
    """The promise of any-fit packing, from which at most twice the rows needed follow."""
    totals = sorted(sum(lengths[example] for example in row) for row in pack(array(*lengths), 40))
    assert all(first + second > 40 for first, second in itertools.pairwise(totals))


def test_an_epoch_goes_through_all_rows_once_and_the_last_batch_may_be_smaller() -> None:
    plan = plan_batches(examples_of(*[6] * 5), training())
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 9)
    batches = [plan.batch(step) for step in range(3)]
    assert [len(batch.rows) for batch in batches] == [2, 2, 1]
    assert sorted(row for batch in batches for row in batch.rows) == [(0,), (1,), (2,), (3,), (4,)]
    assert [(batch.tokens, batch.labels) for batch in batches] == [(12, 10), (12, 10), (6, 5)]


def test_epochs_differ_in_order_and_a_step_needs_none_before_it() -> None:
    examples = examples_of(*range(1, 31))
    plan, again = plan_batches(examples, training(packing=False)), plan_batches(examples, training(packing=False))
    first, second = ([plan.batch(step).rows for step in range(start, start + 15)] for start in (0, 15))
    assert first != second
    assert sorted(sum(first, ())) == sorted(sum(second, ()))
    assert [again.batch(step).rows for step in (29, 3, 15)] == [second[14], first[3], second[0]]


def test_the_order_follows_from_the_seed_and_is_the_same_on_every_machine() -> None:
    """Written down once: a change of this order would break the resumption of every running job."""
    examples = examples_of(*[1] * 8)
    plan = plan_batches(examples, training(packing=False, globalBatchSize=8, seed=42))
    assert [row[0] for row in plan.batch(0).rows] == ORDER_OF_SEED_42
    other = plan_batches(examples, training(packing=False, globalBatchSize=8, seed=43))
    assert [row[0] for row in other.batch(0).rows] != ORDER_OF_SEED_42


ORDER_OF_SEED_42 = [7, 0, 4, 2, 1, 3, 5, 6]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_shares_of_all_workers_are_the_batch(world: int) -> None:
    rows = ((0,), (1, 2), (3,), (4,), (5,))
    lengths = array(9, 1, 1, 5, 4, 3)
    shares = [rank_share(rows, lengths, rank, world) for rank in range(world)]
    assert sorted(sum(shares, ())) == sorted(rows)


def test_shares_are_even_in_tokens() -> None:
    """Of rows of 9, 5, 4, 3 and 2 tokens one worker gets 9 + 3, the other 5 + 4 + 2."""
    rows = ((0,), (1,), (2,), (3,), (4,))
    lengths = array(9, 5, 4, 3, 2)
    assert [rank_share(rows, lengths, rank, 2) for rank in range(2)] == [((0,), (3,)), ((1,), (2,), (4,))]


def test_micro_batches_of_a_fixed_number_of_rows() -> None:
    assert list(micro_batches([(0,), (1,), (2,)], array(1, 1, 1), 2, 100)) == [((0,), (1,)), ((2,),)]


def test_automatic_micro_batches_hold_as_many_rows_as_fit() -> None:
    rows = [(0,), (1,), (2,), (3,)]
    assert list(micro_batches(rows, array(6, 4, 1, 30), "auto", 10)) == [((0,), (1,)), ((2,),), ((3,),)]


@pytest.mark.parametrize("layout", ["flat", "padded"])
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=20), st.integers(1, 200))
def test_automatic_micro_batches_take_no_more_positions_than_fit(layout: Layout, rows: list[list[int]], fit: int) -> None:
    """Positions are those of the tensors that are made of them, padding too; a single row may have more."""
    examples = examples_of(*itertools.chain.from_iterable(rows))
    numbers = iter(range(len(examples)))
    members = [tuple(itertools.islice(numbers, len(row))) for row in rows]
    padded = layout == "padded"
    groups = list(micro_batches(members, examples.lengths(), "auto", fit, padded=padded))
    assert list(itertools.chain.from_iterable(groups)) == members
    for group in groups:
        made = collate(examples, group, layout).input_ids.numel()
        assert positions(group, examples.lengths(), padded=padded) == made
        assert made <= fit or len(group) == 1
