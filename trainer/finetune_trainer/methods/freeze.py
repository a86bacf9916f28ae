"""A part of the weights is trained as it is, the rest is frozen."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from finetune_api.reasons import Reason
from finetune_api.status import ArtifactKind
from finetune_api.v1alpha1 import FreezeMethod
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.methods.modules import decoder_layers, matching_modules
from finetune_trainer.methods.whole_model import save_whole_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Freezing:
    """The last layers or named modules train, in float32; what is frozen stays in the format that it was loaded in."""

    spec: FreezeMethod

    freezes_base = True
    virtual_tokens = 0

    def apply(self, model: torch.nn.Module, *, seed: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> torch.nn.Module:
        """The same model with some of its weights to train. Nothing is new, so neither the seed nor the tokenizer matters.

        Raises JobError (ModelInvalid, InvalidSpec) telling what there is where the spec means nothing.
        """
        del seed, tokenizer
        transformer = cast("PreTrainedModel", model)
        chosen = self._chosen(model)
        if self.spec.embeddings:
            chosen.append(transformer.get_input_embeddings())
        if self.spec.head:
            head = transformer.get_output_embeddings()
            if head is None:
                raise JobError(Reason.INVALID_SPEC, f"method.freeze.head: {type(model).__name__} has no output layer")
            chosen.append(head)
        model.requires_grad_(False)
        for module in chosen:
            for parameter in module.parameters():
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()  # the parameter stays the same one, and what is tied stays tied
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise JobError(Reason.INVALID_SPEC, f"method.freeze.modules: {', '.join(self.spec.modules or ())} hold no weights")
        return model

    def _chosen(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        if self.spec.modules is not None:
            found = matching_modules(model, self.spec.modules, "method.freeze.modules", offer_all=True)
            return [model.get_submodule(name) for name in sorted(found)]
        count, (name, layers) = self.spec.last_layers or 0, decoder_layers(model)
        if count > len(layers):
            raise JobError(
                Reason.INVALID_SPEC, f"method.freeze.lastLayers is {count}, but the model has {len(layers)} layers ({name}.0 and on)"
            )
        return list(layers[len(layers) - count :])

    def export(self, model: torch.nn.Module, folder: Path, base: BaseModel, kind: ArtifactKind) -> None:
        """A whole model in safetensors, in the base model's number format."""
        del kind  # a model is all that it makes
        save_whole_model(cast("PreTrainedModel", model), folder, base)
