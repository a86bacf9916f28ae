"""Soft prompts before every example of a micro-batch: what PEFT's own model makes of each example by itself, in either layout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import job_manifest
from torch.nn import functional
from tuned import method, shake, tiny

from finetune_api.v1alpha1 import parse_job
from finetune_trainer.activations import with_activations
from finetune_trainer.attention import choose_layout
from finetune_trainer.data.examples import Examples, join
from finetune_trainer.data.tensors import Layout, collate
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives import Sft
from finetune_trainer.worker import CPU, Worker

KINDS = ("promptTuning", "pTuning", "prefixTuning")


def examples() -> Examples:
    generator = np.random.default_rng(3)
    return join([(generator.integers(5, 50, length).astype(np.int32), np.ones(length, np.bool_)) for length in (9, 4, 14)])


def prompted(kind: str, layout: Layout) -> CausalModel:
    model = tiny()
    assert choose_layout(model) == "flat"
    if layout == "padded":
        model.set_attn_implementation("sdpa")
    module = method(**{kind: {"numVirtualTokens": 4}}).apply(model, seed=3).train()
    shake(module)
    return CausalModel(module, model, layout, 1.0, torch.float32, CPU)


def pefts_own(kind: str, data: Examples) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum of the losses of all tokens but each example's first, and its gradients, one example at a time."""
    model = prompted(kind, "padded")
    total = torch.zeros(())
    for index in range(len(data)):
        tokens = torch.from_numpy(data.example(index)[0].astype(np.int64))[None]
        logits = model.module(input_ids=tokens).logits[0, -tokens.shape[1] :]
        total = total + functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum")
    return total, list(torch.autograd.grad(total, model.trained_parameters()))


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_pefts(kind: str, layout: Layout, recomputed: bool) -> None:
    data, model = examples(), prompted(kind, layout)
    expected, gradients = pefts_own(kind, data)
    if recomputed:
        model.transformer.activation_checkpointing_enable({"use_reentrant": False})
    loss = Sft().loss(model, collate(data, ((0, 1), (2,)), layout)).total
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for own, reference in zip(torch.autograd.grad(loss, model.trained_parameters()), gradients, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layout", "said"), [("flat", 0), ("padded", 1)])
def test_what_cannot_be_recomputed_is_told(layout: Layout, said: int) -> None:
    job = parse_job(job_manifest(method={"prefixTuning": {}}, training={"gradientCheckpointing": "always"}), local=True)
    model, warnings = with_activations(prompted("prefixTuning", layout), job, Worker())
    assert len(warnings) == said
    assert model.transformer.is_gradient_checkpointing == (not said)


def test_places_of_a_prompt_are_counted_while_it_is_there() -> None:
    for kind in KINDS:
        model = prompted(kind, "flat")
        assert model.virtual_tokens == 4
        with model.untuned() as base:
            assert base.virtual_tokens == 0
    assert replace(model, module=tiny()).virtual_tokens == 0
