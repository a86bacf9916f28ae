"""Forgetting and overfitting: verdicts on courses of losses drawn by hand."""

import math

import numpy as np
import pytest

from finetune_api.evaluation import Suite
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.evaluation.health import forgetting, gap, overfitting
from finetune_trainer.evaluation.history import Course, Point, train_loss
from finetune_trainer.evaluation.scores import Change, Measured, changes, measured
from finetune_trainer.gate import Bounded

INF = math.inf


def suite(role: str = "forgetting", *metrics: str) -> Suite:
    return Suite.model_validate({"name": "general", "source": "pvc://data/general", "role": role, "metrics": metrics or ("loss",)})


def forgot(before: float | None, change: Change, role: str = "forgetting") -> tuple[str, str]:
    found = forgetting(suite(role), [Measured(change.metric, before)], [change])
    assert found is not None
    assert (found.name, found.suite) == ("forgetting", "general")
    return found.verdict, found.message


@pytest.mark.parametrize(
    ("metric", "before", "change", "verdict"),
    [
        ("loss", 2.0, (0.05, 0.02, 0.08), "Good"),  # 5 % of 2.0 is 0.1
        ("loss", 2.0, (-0.5, -0.6, -0.4), "Good"),
        ("loss", 2.0, (0.5, 0.4, 0.6), "Bad"),
        ("loss", 2.0, (0.1, 0.05, 0.15), "Inconclusive"),
        ("loss", 0.02, (0.005, 0.004, 0.006), "Good"),  # a hundredth of a nat is nothing, whatever its share
        ("loss", 2.0, (0.5, -INF, INF), "Inconclusive"),  # one case
        ("loss", 2.0, (0.5, None, None), "Bad"),
        ("exactMatch", 0.8, (-0.02, -0.03, -0.01), "Good"),
        ("exactMatch", 0.8, (-0.3, -0.4, -0.2), "Bad"),
        ("exactMatch", 0.8, (-0.05, -0.1, 0.02), "Inconclusive"),
        ("exactMatch", 0.8, (0.1, 0.02, 0.2), "Good"),
        ("exactMatch", 0.0, (0.0, -0.17, 0.17), "Good"),  # there was nothing to forget
        ("bleu", 40.0, (-8.0, -9.0, -7.0), "Bad"),
        ("perplexity", 10.0, (2.0, 1.0, 3.0), "Bad"),
        ("loss", None, (0.1, 0.0, 0.2), "Inconclusive"),
        ("loss", 2.0, (None, None, None), "Inconclusive"),
    ],
)
def test_forgetting_is_a_clear_change_for_the_worse(
    metric: str, before: float | None, change: tuple[float | None, float | None, float | None], verdict: str
) -> None:
    assert forgot(before, Change(f"general/{metric}", *change))[0] == verdict


def test_forgetting_says_the_figures() -> None:
    assert forgot(2.0, Change("general/loss", 0.5, 0.4, 0.6)) == (
        "Bad",
        "general/loss rose by 0.5 from 2 (interval of the change 0.4 to 0.6): beyond the 0.1 that may be lost",
    )


def test_the_worst_metric_of_a_suite_decides() -> None:
    before = [Measured("general/loss", 2.0), Measured("general/f1", 0.5), Measured("task/f1", 0.5)]
    changed = [Change("general/loss", 0.0, -0.01, 0.01), Change("general/f1", -0.3, -0.4, -0.2), Change("task/f1", -0.5)]
    found = forgetting(suite(), before, changed)
    assert found is not None
    assert (found.verdict, found.message.split()[0]) == ("Bad", "general/f1")
    nothing = forgetting(suite(), before, changed[2:])
    assert nothing is not None
    assert (nothing.verdict, nothing.message) == ("Inconclusive", "nothing of general was measured")
    assert forgetting(suite("task"), before, changed) is None


@pytest.mark.parametrize(("rise", "verdict"), [(0.0, "Good"), (0.4, "Bad")])
def test_forgetting_from_answers_to_verdict(rise: float, verdict: str) -> None:
    losses = np.random.default_rng(9).normal(2.0, 0.5, 80)
    noise = np.random.default_rng(10).normal(0.0, 0.1, 80)
    cases = [Case(str(place), "x") for place in range(80)]
    sides = [
        measured(suite(), cases, [Answered(case.id, loss=float(loss), labels=1) for case, loss in zip(cases, found, strict=True)], 0.95)
        for found in (losses, losses + rise + noise)
    ]
    found = forgetting(suite(), sides[0], changes(sides[1], sides[0], 0.95))
    assert found is not None
    assert found.verdict == verdict


def course(held_out: dict[int, float], train: dict[int, float]) -> Course:
    """A course whose training loss is that of the next later step named, for every step."""
    steps = sorted(train)
    every = {step: train[next(each for each in steps if each >= step)] for step in range(1, max(steps, default=0) + 1)}
    return Course(
        tuple(Point(step, {"train/loss": loss}) for step, loss in every.items()),
        tuple(Point(step, {"validation/loss": loss}) for step, loss in held_out.items()),
    )


FALLING = course({0: 3.0, 10: 2.0, 20: 1.8, 30: 1.75}, {10: 2.4, 20: 1.8, 30: 1.7})
LEARNT_BY_HEART = course({0: 3.0, 10: 2.0, 20: 2.3, 30: 2.9}, {10: 2.2, 20: 0.8, 30: 0.1})
PARTING = course({0: 3.0, 10: 2.0, 20: 1.99, 30: 1.98, 40: 1.98}, {10: 2.0, 20: 1.5, 30: 1.0, 40: 0.4})
WIDE_FROM_THE_START = course({0: 3.0, 10: 2.0, 20: 1.95, 30: 1.9}, {10: 1.2, 20: 1.15, 30: 1.1})
DIVERGED = course({0: 3.0, 10: 5.0, 20: 7.0}, {1: 3.0, 10: 5.5, 20: 7.5})


@pytest.mark.parametrize(
    ("history", "known", "verdict", "words"),
    [
        (FALLING, Bounded(0.05, 0.02, 0.08), "Good", "the validation loss is 1.75, with a gap of 0.05"),
        (LEARNT_BY_HEART, Bounded(2.8, 2.7, 2.9), "Bad", "risen from 2 at step 10 to 2.9 at step 30"),
        (LEARNT_BY_HEART, Bounded(None), "Bad", "more epochs make it worse"),
        (
            PARTING,
            Bounded(1.6, 1.5, 1.7),
            "Inconclusive",
            "the gap has grown from 0.98 at step 30 to 1.58: the training loss falls on alone",
        ),
        (WIDE_FROM_THE_START, Bounded(0.8, 0.7, 0.9), "Good", "does not grow"),
        (DIVERGED, Bounded(-0.5, -0.6, -0.4), "Inconclusive", "learning rate may be too high"),
        (course({0: 3.0, 10: 1.0}, {10: 1.1}), Bounded(0.05, 0.0, 0.1), "Good", "gap of 0.05"),
        (course({0: 3.0, 10: 1.0}, {10: 0.2}), Bounded(0.8, 0.7, 0.9), "Inconclusive", "measured 1 times"),
        (course({0: 3.0, 10: 2.0, 20: 1.9, 30: 1.9}, {}), Bounded(None), "Good", "of unknown width"),
        (course({}, {10: 0.2}), Bounded(None), "Inconclusive", "not measured"),
        (course({0: 0.02, 10: 0.02, 20: 0.025}, {10: 0.02, 20: 0.01}), Bounded(0.001), "Good", "0.025"),  # half a hundredth of a nat
    ],
    ids=[
        "falling",
        "by heart",
        "by heart, no gap",
        "parting",
        "wide",
        "diverged",
        "two points",
        "one point",
        "no training",
        "none",
        "tiny",
    ],
)
def test_overfitting(history: Course, known: Bounded, verdict: str, words: str) -> None:
    found = overfitting(history, known)
    assert (found.name, found.suite, found.verdict) == ("overfitting", None, verdict)
    assert words in found.message


def test_a_model_of_an_earlier_step_is_judged_by_what_was_before_it() -> None:
    assert overfitting(LEARNT_BY_HEART, Bounded(0.1), step=10).verdict == "Good"
    assert overfitting(LEARNT_BY_HEART, Bounded(2.0), step=20).verdict == "Bad"


def test_the_gap_is_validation_less_training() -> None:
    """Independent: the half of its interval is the root of the summed squares of theirs, 0.3 and 0.4."""
    found = gap(Measured("train/loss", 1.0, 0.7, 1.3, n=50), Measured("validation/loss", 1.5, 1.1, 1.9, n=20))
    assert (found.metric, found.value, found.n) == ("train/gap", 0.5, 20)
    assert (found.low, found.high) == (pytest.approx(0.0), pytest.approx(1.0))
    assert gap(Measured("train/loss", 1.0), Measured("validation/loss", 1.5, 1.1, 1.9)) == Measured("train/gap", 0.5)
    assert gap(Measured("train/loss", None), Measured("validation/loss", 1.5)) == Measured("train/gap", None)


def test_the_training_loss_of_a_step_is_that_of_the_latest_ones() -> None:
    """Independent: the means of 1..5 and of 91..100 and of 181..200; how often the validation loss was measured changes nothing."""
    falling = {step: float(step) for step in range(1, 201)}
    for held_out in ({0: 9.0}, {0: 9.0, 99: 9.0, 199: 9.0}):
        known = course(held_out, falling)
        assert [train_loss(known, step) for step in (0, 5, 100, 200)] == [1.0, 3.0, 95.5, 190.5]
    assert train_loss(course({0: 9.0}, {1: 1.0}), 50) is None
