"""What fits into a GPU's memory, worked out by hand for Llama 3 8B."""

import pytest
import torch
from transformers import LlamaConfig

from finetune_api.estimate import Held, Kept, kept_by, layer_bytes, plan_activations
from finetune_api.methods import FullMethod, LoraMethod, Method
from finetune_api.v1alpha1 import Training
from finetune_trainer.memory import coming_bytes, shape_of, state_bytes

SHAPE = shape_of(LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8))
LORA, FULL = Method(lora=LoraMethod()), Method(full=FullMethod())
HELD = Held(SHAPE, kept_by(LORA), 2, 32)
GIB = 2**30


def test_what_a_layer_keeps_of_a_token() -> None:
    """LoRA in bfloat16: 2 x 4,096 x 4 of the norms' inputs, and 5 x 4,096 + 2 x 1,024 + 4 x 14,336 numbers of 2 bytes."""
    assert layer_bytes(SHAPE, kept_by(LORA), 2) == 32_768 + 2 * 79_872
    assert layer_bytes(SHAPE, kept_by(LORA), 4) == 32_768 + 4 * 79_872
    assert layer_bytes(SHAPE, Kept(0, 0, 1, 0), 2) == 2048
    assert layer_bytes(SHAPE, kept_by(FULL), 2) == 7 * 4 * 4096 + 2 * (2 * 4096 + 2 * 1024 + 4 * 14336)


def test_activations_are_kept_where_they_fit() -> None:
    """A token takes 32 x 192,512 + 4.5 x 2 x 4,096 + 14,336 = 6,211,584 bytes: 0.6 of 110 GiB hold 11,408."""
    plan = plan_activations(HELD, Training(max_sequence_length=2048), 110 * GIB)
    assert (plan.recomputed, plan.tokens) == (False, 11408)


def test_they_are_recomputed_where_they_do_not_fit() -> None:
    """Then 32 x 8,192 + 192,512 + 21 x 4,096 + 3 x 14,336 = 583,680: 0.6 of 10 GiB hold 11,037."""
    plan = plan_activations(HELD, Training(max_sequence_length=2048), 10 * GIB)
    assert (plan.recomputed, plan.tokens) == (True, 11037)


@pytest.mark.parametrize(("asked", "recomputed"), [("always", True), ("never", False)])
def test_the_training_may_decide(asked: str, recomputed: bool) -> None:
    for free in (GIB, 500 * GIB):
        spec = Training(gradient_checkpointing=asked)
        assert plan_activations(HELD, spec, free).recomputed is recomputed


def test_a_micro_batch_has_at_least_a_row_and_no_more_than_helps() -> None:
    """The last is asked for as rows: 16 of 4,096 tokens are 379 GiB."""
    assert plan_activations(HELD, Training(max_sequence_length=4096), GIB).tokens == 4096
    assert plan_activations(HELD, Training(max_sequence_length=64), 900 * GIB).tokens == 32768
    assert plan_activations(HELD, Training(max_sequence_length=4096, micro_batch_size=16), 110 * GIB).recomputed


def test_what_the_state_of_a_training_takes() -> None:
    """Frozen: 6 numbers of 2 bytes. Trained: 12 of 4 bytes, with their gradients and two moments."""
    module = torch.nn.ModuleList([torch.nn.Linear(3, 2, bias=False, dtype=torch.bfloat16), torch.nn.Linear(3, 4, bias=False)])
    module[0].requires_grad_(False)
    assert state_bytes(module) == 6 * 2 + 12 * 4 * 4
    assert coming_bytes(module) == 12 * 4 * 3
