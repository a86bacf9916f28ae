"""What fits into a GPU's memory, worked out by hand for Llama 3 8B."""

import pytest
import torch
from transformers import LlamaConfig

from finetune_api.v1alpha1 import Training
from finetune_trainer.memory import activation_bytes, coming_bytes, plan_activations, state_bytes

LLAMA_3_8B = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
A_TOKEN = 7_864_320
"""Bytes of a token's activations in bfloat16: 32 layers of 16 x 4,096 + 4 x 14,336 = 122,880 numbers."""
GIB = 2**30


def test_what_a_forward_pass_leaves_behind() -> None:
    assert activation_bytes(LLAMA_3_8B, 1, torch.bfloat16) == A_TOKEN
    assert activation_bytes(LLAMA_3_8B, 1000, torch.float32) == 2000 * A_TOKEN


def test_activations_are_kept_where_they_fit() -> None:
    """8,192 tokens are 60 GiB, and 0.6 of 110 GiB are 66; that is room for 9,011 tokens."""
    plan = plan_activations(LLAMA_3_8B, Training(max_sequence_length=2048), torch.bfloat16, 110 * GIB)
    assert (plan.recomputed, plan.tokens) == (False, 9011)


def test_they_are_recomputed_where_they_do_not_fit() -> None:
    """Recomputed a token takes 32 x 4,096 x 2 bytes and one layer's 245,760: 507,904, of which 0.6 of 10 GiB holds 12,684."""
    plan = plan_activations(LLAMA_3_8B, Training(max_sequence_length=2048), torch.bfloat16, 10 * GIB)
    assert (plan.recomputed, plan.tokens) == (True, 12684)


@pytest.mark.parametrize(("asked", "recomputed"), [("always", True), ("never", False)])
def test_the_training_may_decide(asked: str, recomputed: bool) -> None:
    for free in (GIB, 500 * GIB):
        spec = Training(gradient_checkpointing=asked)
        assert plan_activations(LLAMA_3_8B, spec, torch.bfloat16, free).recomputed is recomputed


def test_a_micro_batch_has_at_least_a_row_and_no_more_than_helps() -> None:
    """The second is asked for as rows: 16 of 4,096 tokens are 480 GiB."""
    assert plan_activations(LLAMA_3_8B, Training(max_sequence_length=4096), torch.bfloat16, GIB).tokens == 4096
    assert plan_activations(LLAMA_3_8B, Training(max_sequence_length=64), torch.bfloat16, 900 * GIB).tokens == 32768
    assert plan_activations(LLAMA_3_8B, Training(max_sequence_length=4096, micro_batch_size=16), torch.bfloat16, 110 * GIB).recomputed


def test_what_the_state_of_a_training_takes() -> None:
    """Frozen: 6 numbers of 2 bytes. Trained: 12 of 4 bytes, with their gradients and two moments."""
    module = torch.nn.ModuleList([torch.nn.Linear(3, 2, bias=False, dtype=torch.bfloat16), torch.nn.Linear(3, 4, bias=False)])
    module[0].requires_grad_(False)
    assert state_bytes(module) == 6 * 2 + 12 * 4 * 4
    assert coming_bytes(module) == 12 * 4 * 3
