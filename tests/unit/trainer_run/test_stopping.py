"""When the training stops and which checkpoint is the best, worked out by hand."""

import json

import pytest

from finetune_api.training import EarlyStopping
from finetune_trainer.stopping import Validations


def after(losses: list[float], rule: EarlyStopping | None) -> list[tuple[int | None, float | None, bool]]:
    """Best step, best loss and whether it is over, after each loss; one every 10 steps."""
    validations, seen = Validations(), []
    for index, loss in enumerate(losses):
        validations = validations.after(10 * (index + 1), loss, rule)
        seen.append((validations.best_step, validations.best_loss, validations.over(rule)))
    return seen


def test_patience_counts_measurements_in_a_row() -> None:
    rule = EarlyStopping(patience=2)
    assert after([3.0, 2.0, 2.5, 1.0, 1.0, 1.5], rule) == [
        (10, 3.0, False),
        (20, 2.0, False),
        (20, 2.0, False),
        (40, 1.0, False),
        (40, 1.0, False),  # the same is not better
        (40, 1.0, True),
    ]


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ([2.0, 1.95, 1.92], True),  # neither is lower than 2.0 by more than 0.1
        ([2.0, 1.95, 1.85], False),  # the second fall together with the first is
        ([2.0, 1.9], False),
    ],
)
def test_a_fall_has_to_be_worth_it(losses: list[float], over: bool) -> None:
    rule = EarlyStopping(patience=2, min_delta=0.1)
    assert after(losses, rule)[-1] == (10 * len(losses), losses[-1], over)


def test_without_a_rule_it_is_never_over() -> None:
    assert after([1.0, 2.0, 3.0, 4.0], None)[-1] == (10, 1.0, False)


def test_a_checkpoint_holds_all_of_it() -> None:
    validations = Validations().after(10, 2.0, None).after(20, 3.0, None)
    assert Validations.from_json(json.loads(json.dumps(validations.to_json()))) == validations
    assert Validations.from_json(None) == Validations()
