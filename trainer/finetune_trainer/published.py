"""A published adapter around its base model, as the ecosystem loads it: nothing of it trains."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""PEFT would look for an absent one on the hub, or take pickled weights."""


@dataclass(frozen=True)
class Published:
    """The change that puts an adapter's folder into a model."""

    folder: Path
    freezes_base: bool = True
    virtual_tokens: int = 0

    def apply(self, model: torch.nn.Module, *, seed: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> torch.nn.Module:
        """The model with the adapter; on the `meta` device without its weights. Raises JobError (ModelInvalid)."""
        del seed, tokenizer
        from peft import PeftConfig, PeftModel, get_peft_model

        import finetune_trainer.methods.bottleneck  # noqa: F401 - so that PEFT knows these adapters too

        for name in _FILES:
            if not (self.folder / name).is_file():
                raise JobError(Reason.MODEL_INVALID, f"{self.folder} holds no adapter ({name})")
        base = cast("PreTrainedModel", model)
        try:
            if next(base.parameters()).device.type == "meta":
                module: torch.nn.Module = get_peft_model(base, PeftConfig.from_pretrained(str(self.folder)))
            else:
                module = PeftModel.from_pretrained(base, str(self.folder))
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            detail = str(error).strip().splitlines()
            problem = f"{self.folder} is no adapter of this base model: {detail[0] if detail else repr(error)}"
            raise JobError(Reason.MODEL_INVALID, problem) from error
        return module.requires_grad_(False)
