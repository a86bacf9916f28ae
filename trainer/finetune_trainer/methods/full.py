"""Every weight is trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from finetune_trainer.methods.method import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FullTuning:
    """Every weight of the base model; kept in float32 while training, since small updates would be lost in bfloat16."""

    freezes_base = False
    virtual_tokens = 0

    def apply(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        """All parameters train. There are no new ones, so the seed does not matter."""
        del seed
        return model.requires_grad_(True)

    def export(self, model: torch.nn.Module, folder: Path, base: BaseModel) -> Literal["adapter", "model"]:
        """A whole model in safetensors, in the base model's number format."""
        whole = cast("PreTrainedModel", model)
        dtype = getattr(torch, base.dtype or "float32")
        converted: dict[int, torch.Tensor] = {}  # by identity: tied weights stay one tensor, which is how they are recognised

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in converted:
                converted[id(tensor)] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
            return converted[id(tensor)]

        state = {name: convert(tensor) for name, tensor in whole.state_dict(keep_vars=True).items()}
        whole.save_pretrained(folder, state_dict=state)
        before = whole.config.dtype
        whole.config.dtype = dtype  # save_pretrained wrote the format of the weights in memory
        try:
            whole.config.save_pretrained(folder)
        finally:
            whole.config.dtype = before
        return "model"
