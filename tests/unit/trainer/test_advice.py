"""Advice about a method, by the number of examples."""

import pytest

from finetune_api.v1alpha1 import Method
from finetune_trainer.methods.advice import advice


@pytest.mark.parametrize(("key", "examples", "warned"), [("full", 999, True), ("full", 1000, False), ("lora", 10, False)])
def test_full_tuning_on_few_examples_is_warned_of(key: str, examples: int, warned: bool) -> None:
    said = advice(Method.model_validate({key: {}}), examples)
    assert bool(said) is warned
    assert all(f"{examples:,} examples" in sentence for sentence in said)
