"""How a model's activations are held: recomputed or not, and of how many tokens at once, by what memory is left for them."""

from dataclasses import replace

import torch

from finetune_api.estimate import plan_activations
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.memory import coming_bytes, held_of
from finetune_trainer.model import CausalModel
from finetune_trainer.parts import local_part
from finetune_trainer.worker import Worker


def with_activations(model: CausalModel, job: FineTuneJob, worker: Worker) -> tuple[CausalModel, tuple[str, ...]]:
    """The model with its activations held as memory and training ask for; and warnings.

    Every worker calls it, and again once something else has taken memory. All go by the one with the least: those that hold parts of a
    model must compute it equally often.
    """
    training = job.spec.training
    warnings: tuple[str, ...] = ()
    if not model.recomputable:
        if training.gradient_checkpointing == "always":
            warnings = ("activations are not recomputed: this model's layers would lose the prefix",)
        training = training.model_copy(update={"gradient_checkpointing": "never"})
    recomputed = training.gradient_checkpointing == "always"
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        left = worker.least(free - coming_bytes(model.module) // _parts(model))
        plan = plan_activations(held_of(model.transformer, job.spec.method, model.precision), training, left)
        model, recomputed = replace(model, auto_tokens=plan.tokens), plan.recomputed
    if recomputed:
        model.transformer.activation_checkpointing_enable({"use_reentrant": False})
    return model, warnings


def _parts(model: CausalModel) -> int:
    """Into how many parts its parameters are split."""
    weight = next(model.transformer.parameters())
    return max(1, round(weight.numel() / max(1, local_part(weight).numel()))) if model.sharded else 1
