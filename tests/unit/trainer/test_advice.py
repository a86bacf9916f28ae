"""Advice about a method, by the number of examples, and about a strategy, by the number of processes."""

import pytest

from finetune_api.v1alpha1 import Compute, Method
from finetune_trainer.methods.advice import advice, strategy_advice

FEWEST = {"full": 1000, "freeze": 1000, "lora": 100, "adapter": 100, "ia3": 50, "promptTuning": 1000, "prefixTuning": 1000, "pTuning": 1000}


@pytest.mark.parametrize("key", FEWEST)
def test_too_few_examples_for_a_method_are_warned_of_with_the_number(key: str) -> None:
    method = Method.model_validate({key: {"lastLayers": 1} if key == "freeze" else {}})
    (said,) = advice(method, FEWEST[key] - 1)
    assert said.startswith(f"method.{key} trains on {FEWEST[key] - 1:,} examples; with fewer than {FEWEST[key]:,} ")
    assert advice(method, FEWEST[key]) == ()


def test_every_method_has_a_number() -> None:
    assert set(FEWEST) == {info.alias or name for name, info in Method.model_fields.items()}


@pytest.mark.parametrize(
    ("strategy", "workers", "processes", "warned"),
    [("fsdp", 1, 1, True), ("fsdp", 2, 1, False), ("fsdp", 1, 2, False), ("auto", 1, 1, False), ("ddp", 1, 1, False)],
)
def test_sharding_over_one_process_is_warned_of(strategy: str, workers: int, processes: int, warned: bool) -> None:
    """An elastic job may come to have more than one."""
    compute = Compute.model_validate({"strategy": strategy, "workers": {"min": 1, "max": workers}})
    said = strategy_advice(compute, processes)
    assert [sentence.startswith("compute.strategy fsdp is without effect") for sentence in said] == [True] * warned
