"""Advice about a method, by the number of examples, and about a strategy, by the number of processes."""

import pytest

from finetune_api.v1alpha1 import Compute, Method
from finetune_trainer.methods.advice import advice, strategy_advice


@pytest.mark.parametrize(("key", "examples", "warned"), [("full", 999, True), ("full", 1000, False), ("lora", 10, False)])
def test_full_tuning_on_few_examples_is_warned_of(key: str, examples: int, warned: bool) -> None:
    said = advice(Method.model_validate({key: {}}), examples)
    assert bool(said) is warned
    assert all(f"{examples:,} examples" in sentence for sentence in said)


@pytest.mark.parametrize(
    ("strategy", "workers", "processes", "warned"),
    [("fsdp", 1, 1, True), ("fsdp", 2, 1, False), ("fsdp", 1, 2, False), ("auto", 1, 1, False), ("ddp", 1, 1, False)],
)
def test_sharding_over_one_process_is_warned_of(strategy: str, workers: int, processes: int, warned: bool) -> None:
    """An elastic job may come to have more than one."""
    compute = Compute.model_validate({"strategy": strategy, "workers": {"min": 1, "max": workers}})
    said = strategy_advice(compute, processes)
    assert [sentence.startswith("compute.strategy fsdp is without effect") for sentence in said] == [True] * warned
