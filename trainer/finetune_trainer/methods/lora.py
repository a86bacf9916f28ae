"""Low-rank updates beside frozen weights (Hu et al. 2021) and their variants, by PEFT, whose folders the ecosystem loads."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune_api.reasons import Reason
from finetune_api.status import ArtifactKind
from finetune_api.v1alpha1 import LoraMethod
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel, trained_state
from finetune_trainer.methods.modules import matching_modules, shortened
from finetune_trainer.methods.peft_models import ADAPTER, named_after, save_adapter, save_merged, tied_names, with_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "method.lora.targetModules"
PISSA = "pissa_niter_16"
"""PEFT's name of the fast singular value decomposition: its random start follows from the seed."""
_BEGINNING = "pissa_beginning"
"""Attribute of a PiSSA model: its update as it began, by parameter."""


@dataclass(frozen=True)
class Lora:
    """LoRA as the spec asks for it."""

    spec: LoraMethod

    freezes_base = True
    virtual_tokens = 0

    def apply(self, model: torch.nn.Module, *, seed: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> torch.nn.Module:
        """The PEFT model around the frozen one; the updates are float32 and change nothing at first.

        PiSSA (Meng et al. 2024) takes the principal components out of the base weights and trains them as the update, so the model stays
        what it was, while its base weights are the rest. Both follow from the weights and the seed, on every worker and after a restart.
        """
        from peft import LoraConfig

        from finetune_trainer.methods.lora_linear import use_fused_linear

        del tokenizer
        found = matching_modules(model, self.spec.target_modules, FIELD)
        pissa = self.spec.variant == "pissa"
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        if pissa:
            self._check_pissa(model, found)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.spec.rank,
            lora_alpha=self.spec.alpha,
            lora_dropout=self.spec.dropout,
            target_modules=shortened(model, found),
            use_dora=self.spec.variant == "dora",
            use_rslora=self.spec.variant == "rslora",
            init_lora_weights=PISSA if pissa and not on_meta else True,
        )
        if self.spec.variant != "dora" and not _is_quantized(model):
            use_fused_linear(config)
        wrapped = with_adapter(model, config, seed=seed, field=FIELD)
        if pissa and not on_meta:
            _remember_beginning(wrapped)
        return wrapped

    def _check_pissa(self, model: torch.nn.Module, found: set[str]) -> None:
        tied = tied_names(model)
        for name in sorted(found):
            weight = getattr(model.get_submodule(name), "weight", None)
            if weight is None or weight.ndim != 2:
                continue  # PEFT says what is wrong with it
            if not weight.dtype.is_floating_point:
                raise JobError(Reason.INVALID_SPEC, "method.lora.variant pissa needs whole weights: set model.quantization to none")
            if min(weight.shape) < self.spec.rank:
                few = f"{name} has only {min(weight.shape)} principal components"
                raise JobError(Reason.INVALID_SPEC, f"method.lora.rank is {self.spec.rank}, but {few}, which pissa takes its rank from")
            if name in tied:
                raise JobError(Reason.INVALID_SPEC, f"method.lora.variant pissa would change {name}, which shares its weights with another")

    def export(self, model: torch.nn.Module, folder: Path, base: BaseModel, kind: ArtifactKind) -> None:
        """adapter: a PEFT adapter folder. merged: the base model with the update added; `model` is not to be used after that."""
        if kind == "merged":
            save_merged(model, folder, base)
        elif hasattr(model, _BEGINNING):
            _save_pissa(model, folder, base)
        else:
            save_adapter(model, folder, base)


def _is_quantized(model: torch.nn.Module) -> bool:
    """Whether its frozen weights are packed: then PEFT has layers of its own for them."""
    return getattr(model, "hf_quantizer", None) is not None


def _remember_beginning(model: Any) -> None:  # noqa: ANN401 - a PEFT model, which has no types
    """Keep PiSSA's update as it began: published is what was learnt since, and the untuned model is the one with this update.

    PEFT's own way to disable an adapter would leave the rest of the weights alone, which is no model that anybody had.
    """
    beginning = {name: tensor.to("cpu", copy=True) for name, tensor in trained_state(model).items()}
    setattr(model, _BEGINNING, beginning)

    @contextmanager
    def disable_adapter() -> Iterator[None]:
        parameters = {name: parameter for name, parameter in model.named_parameters() if name in beginning}
        learnt = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = beginning[name].to(parameter.device)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = learnt[name]

    model.disable_adapter = disable_adapter


def _save_pissa(model: Any, folder: Path, base: BaseModel) -> None:  # noqa: ANN401 - a PEFT model, which has no types
    """Write an ordinary LoRA folder for the whole base model.

    What was learnt is B A - B0 A0, which is the product of [B, -B0] and [A; A0]: a LoRA of twice the rank and, at the same scale, twice
    the alpha.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    began = {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in getattr(model, _BEGINNING).items()}
    tensors = {}
    for name, now in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        then = began[name].to(now.device)
        tensors[name] = (torch.cat([now, then], dim=0) if ".lora_A." in name else torch.cat([now, -then], dim=1)).contiguous()
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.init_lora_weights, config.inference_mode = True, True
    with named_after(base, config):
        config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
