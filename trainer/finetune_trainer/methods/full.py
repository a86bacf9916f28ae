"""Every weight is trained."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from finetune_api.status import ArtifactKind
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.methods.whole_model import save_whole_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class FullTuning:
    """Every weight of the base model; kept in float32 while training, since small updates would be lost in bfloat16."""

    freezes_base = False
    virtual_tokens = 0

    def apply(self, model: torch.nn.Module, *, seed: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> torch.nn.Module:
        """All parameters train. There are no new ones, so neither the seed nor the tokenizer matters."""
        del seed, tokenizer
        return model.requires_grad_(True)

    def export(self, model: torch.nn.Module, folder: Path, base: BaseModel, kind: ArtifactKind) -> None:
        """A whole model in safetensors, in the base model's number format."""
        del kind  # a model is all that it makes
        save_whole_model(cast("PreTrainedModel", model), folder, base)
