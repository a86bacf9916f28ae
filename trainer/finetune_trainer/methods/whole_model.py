"""A whole model as transformers loads it: safetensors and configuration in the base model's number format."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune_trainer.methods.method import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_whole_model(model: "PreTrainedModel", folder: Path, base: BaseModel) -> None:
    """Write the model; the one in memory stays as it is. Only weights of another number format than the base's are copied."""
    dtype = number_format(base)
    converted: dict[int, torch.Tensor] = {}  # by identity: tied weights stay one tensor, which is how they are recognised

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in converted:
            converted[id(tensor)] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        return converted[id(tensor)]

    state = {name: convert(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(folder, state_dict=state)
    before = model.config.dtype
    model.config.dtype = dtype  # save_pretrained wrote the format of the weights in memory
    try:
        model.config.save_pretrained(folder)
    finally:
        model.config.dtype = before


def number_format(base: BaseModel) -> torch.dtype:
    """What a published whole model's weights are kept in."""
    dtype: torch.dtype = getattr(torch, base.dtype or "float32")
    return dtype
