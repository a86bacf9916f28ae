"""Learned vectors that rescale keys, values and feed-forward activations (Liu et al. 2022, (IA)^3), by PEFT."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from finetune_api.reasons import Reason
from finetune_api.status import ArtifactKind
from finetune_api.v1alpha1 import Ia3Method
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.methods.modules import matching_modules, shortened
from finetune_trainer.methods.peft_models import save_adapter, save_merged, with_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIELD = "method.ia3.targetModules"


@dataclass(frozen=True)
class Ia3:
    """(IA)^3 as the spec asks for it."""

    spec: Ia3Method

    freezes_base = True
    virtual_tokens = 0

    def apply(self, model: torch.nn.Module, *, seed: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> torch.nn.Module:
        """The PEFT model around the frozen one; every vector begins as ones, so the model stays what it was."""
        from peft import IA3Config

        del tokenizer
        targets, feed_forward = self._modules(model)
        is_conv = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in targets)
        names, inner = shortened(model, targets), shortened(model, feed_forward)
        if not set(inner) <= set(names):  # PEFT compares the two lists as they are written
            names, inner = sorted(targets), sorted(feed_forward)
        config = IA3Config(task_type="CAUSAL_LM", target_modules=names, feedforward_modules=inner, fan_in_fan_out=is_conv)
        return with_adapter(model, config, seed=seed, field=FIELD)

    def _modules(self, model: torch.nn.Module) -> tuple[set[str], set[str]]:
        """The modules that are rescaled, and those of them whose inputs are. Raises JobError (InvalidSpec)."""
        from peft.utils.constants import (
            TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
            TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        )

        targets, feed_forward = self.spec.target_modules, self.spec.feed_forward_modules or ()
        if targets is None:
            architecture = cast("PreTrainedModel", model).config.model_type
            known: Any = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(architecture)
            if known is None:
                raise JobError(Reason.INVALID_SPEC, f"{FIELD}: PEFT does not know which modules of {architecture} to rescale; name them")
            targets = tuple(known)
            feed_forward = tuple(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(architecture, ()))
        inner = matching_modules(model, feed_forward, "method.ia3.feedForwardModules")
        return matching_modules(model, targets, FIELD), inner

    def export(self, model: torch.nn.Module, folder: Path, base: BaseModel, kind: ArtifactKind) -> None:
        """adapter: a PEFT adapter folder. merged: the base model, rescaled; `model` is not to be used after that."""
        if kind == "merged":
            save_merged(model, folder, base)
        else:
            save_adapter(model, folder, base)
