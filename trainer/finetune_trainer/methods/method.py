"""What every method offers, and what all of them share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from finetune_api.status import ArtifactKind, ModelSummary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BaseModel:
    """What a published adapter says of the model that it belongs to."""

    name: str
    """`owner/name` of a hub model, else the place that the job named."""
    revision: str | None = None
    """Commit of a hub model."""
    dtype: str | None = None
    """Number format of its weights, which a published whole model keeps: bfloat16, float16, float32."""


class ModelChange(Protocol):
    """What is done to a model before it is used: a method's parameters added, or nothing."""

    @property
    def freezes_base(self) -> bool:
        """Whether the base model's weights stay as they are, and so may be kept in the computation's number format."""
        ...

    @property
    def virtual_tokens(self) -> int:
        """Places that the method takes of the model's context before each example: 0 but for soft prompts."""
        ...

    def apply(self, model: torch.nn.Module, *, seed: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> torch.nn.Module:
        """Add the method's parameters and set what trains. New parameters follow from the seed. A model on the `meta` device will do.

        The tokenizer is the model's, for methods that begin with words. Raises JobError (ModelInvalid, InvalidSpec) where the method does
        not fit the model.
        """
        ...


class Method(ModelChange, Protocol):
    """One way in which weights change."""

    def export(self, model: torch.nn.Module, folder: Path, base: BaseModel, kind: ArtifactKind) -> None:
        """Write what the ecosystem loads into an empty folder (safetensors and configuration; no tokenizer).

        The model is not to be used any more once it is exported as `merged`.
        """
        ...


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that train, by name. Detached, not copied."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: torch.nn.Module) -> ModelSummary:
    """How many parameters there are, with those that a method has added, and how many of them train. Each is counted once."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ModelSummary(parameters=sum(parameter.numel() for parameter in parameters), trained_parameters=trained)
