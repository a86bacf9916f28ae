"""The history of losses: bounded, without gaps or duplicates, and the same however often the training was interrupted."""

import math
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.evaluation.history import HISTORY, POINTS_MAX, Course, History, Point, Thinned, read_history
from finetune_trainer.storage import Storage

EVERY = 7
"""Steps between two checkpoints."""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(LocalFileSystem(), str(tmp_path), f"file://{tmp_path}")


def test_what_was_measured_is_read_again(storage: Storage) -> None:
    history = History(storage)
    history.held_out(0, {"validation": 2.0, "validation/rewardAccuracy": 0.5})
    history.train(1, {"train/loss": 1.5, "train/learningRate": 1e-4})
    history.keep()
    assert read_history(storage) == Course(
        train=(Point(1, {"train/loss": 1.5, "train/learningRate": 1e-4}),),
        held_out=(Point(0, {"validation/loss": 2.0, "validation/rewardAccuracy": 0.5}),),
    )


def test_what_was_not_kept_is_not_there(storage: Storage) -> None:
    History(storage).train(1, {"train/loss": 1.5})
    assert read_history(storage) == Course()


def test_a_worker_without_a_storage_keeps_nothing() -> None:
    history = History(None)
    history.train(1, {"train/loss": 1.0})
    history.keep()


def test_what_came_after_the_checkpoint_is_forgotten(storage: Storage) -> None:
    history = History(storage)
    for step in range(1, 10):
        history.train(step, {"train/loss": 1.0 / step})
    history.held_out(8, {"validation": 1.0})
    history.keep()
    resumed = History(storage, 6)
    resumed.train(7, {"train/loss": 5.0})
    resumed.keep()
    course = read_history(storage)
    assert [(point.step, point.values["train/loss"]) for point in course.train][-2:] == [(6, 1.0 / 6), (7, 5.0)]
    assert course.held_out == ()


def test_a_measurement_that_is_repeated_stands_once(storage: Storage) -> None:
    history = History(storage)
    history.held_out(4, {"validation": 1.0})
    history.held_out(4, {"validation": 1.0})
    history.keep()
    assert read_history(storage).held_out == (Point(4, {"validation/loss": 1.0}),)


def test_the_untuned_models_losses_may_be_told_at_every_start(storage: Storage) -> None:
    history = History(storage)
    history.held_out(0, {"validation": 3.0})
    history.held_out(4, {"validation": 2.0})
    history.keep()
    resumed = History(storage, 4)
    resumed.held_out(0, {"validation": 3.0})
    resumed.held_out(8, {"validation": 1.0})
    resumed.keep()
    assert [(point.step, point.values["validation/loss"]) for point in read_history(storage).held_out] == [(0, 3.0), (4, 2.0), (8, 1.0)]


def test_what_is_no_number_is_left_out(storage: Storage) -> None:
    history = History(storage)
    history.train(1, {"train/loss": math.nan, "train/gradNorm": 1.0})
    history.train(2, {"train/loss": math.inf})
    history.keep()
    assert read_history(storage).train == (Point(1, {"train/gradNorm": 1.0}),)


def test_a_long_training_is_thinned_evenly() -> None:
    series = Thinned()
    for step in range(1, 100_001):
        series.add(Point(step, {}))
        assert len(series.points) <= POINTS_MAX
    steps = [point.step for point in series.points]
    # 1,000 points at most: 100,000 steps need a stride of 128, of which 781 multiples fit; the first and the latest stand beside them.
    assert steps == [1, *range(128, 100_000, 128), 100_000]


def test_a_stride_that_misses_every_step_still_leaves_the_ends() -> None:
    series = Thinned(most=4)
    for step in range(1, 100, 2):  # no odd step is a multiple of two
        series.add(Point(step, {}))
    assert [point.step for point in series.points] == [1, 99]


@settings(deadline=None)
@given(steps=st.integers(1, 400), most=st.integers(3, 40), kills=st.lists(st.integers(1, 60), max_size=6))
def test_killed_anywhere_it_ends_as_undisturbed(steps: int, most: int, kills: list[int]) -> None:
    """A kill loses what came after the last file that was written; that may be later than the checkpoint that is gone on from."""
    undisturbed = Thinned(most=most)
    for step in range(1, steps + 1):
        undisturbed.add(Point(step, {"loss": 1.0 / step}))
    state, step = Thinned(most=most), 0
    for lives in kills:
        for _ in range(min(lives, steps - step)):
            step += 1
            state.add(Point(step, {"loss": 1.0 / step}))
        written = Thinned(tuple(state.points), state.stride, most)
        step = (step // EVERY) * EVERY
        written.forget_after(step)
        state = written
    for rest in range(step + 1, steps + 1):
        state.add(Point(rest, {"loss": 1.0 / rest}))
    assert state.points == undisturbed.points


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"train": {"points": [{"step": 1}]}},
        {"train": {"stride": 0, "points": [{"step": 1}]}},
        {"train": {"stride": 1, "points": [{"step": "one"}]}},
        {"train": {"stride": 1, "points": [{"step": 2}, {"step": 1}]}},
        {"train": {"stride": 1, "points": [{"step": 1, "train/loss": "much"}]}},
        {"train": {"stride": 1, "points": [None]}},
    ],
)
def test_a_file_that_is_no_history_counts_for_nothing(storage: Storage, content: object) -> None:
    storage.write_json(HISTORY, content)
    assert read_history(storage) == Course()
    History(storage, 3).train(4, {"train/loss": 1.0})
