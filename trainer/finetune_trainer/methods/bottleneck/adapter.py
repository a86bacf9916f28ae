"""The method `adapter` of a spec."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune_api.reasons import Reason
from finetune_api.status import ArtifactKind
from finetune_api.v1alpha1 import AdapterMethod
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.methods.modules import shortened
from finetune_trainer.methods.peft_models import save_adapter, with_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BottleneckAdapter:
    """Down- and up-projections after the blocks of every layer; the model begins as it was."""

    spec: AdapterMethod

    freezes_base = True
    virtual_tokens = 0

    def apply(self, model: torch.nn.Module, *, seed: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> torch.nn.Module:
        """The PEFT model around the frozen one. Raises JobError (InvalidSpec) telling what layers hold where no blocks are found."""
        from finetune_trainer.methods.bottleneck.bottleneck_adapter import BottleneckConfig, blocks_of

        del tokenizer
        try:
            blocks = blocks_of(model, self.spec.placement)
        except ValueError as error:
            raise JobError(Reason.INVALID_SPEC, f"method.adapter.placement: {error}") from error
        config = BottleneckConfig(
            task_type="CAUSAL_LM",
            target_modules=shortened(model, blocks),
            placement=self.spec.placement,
            reduction_factor=self.spec.reduction_factor,
            non_linearity=self.spec.non_linearity,
            dropout=self.spec.dropout,
        )
        return with_adapter(model, config, seed=seed, field="method.adapter")

    def export(self, model: torch.nn.Module, folder: Path, base: BaseModel, kind: ArtifactKind) -> None:
        """A PEFT adapter folder, with the file that lets PEFT load it."""
        from finetune_trainer.methods.bottleneck import bottleneck_adapter

        del kind  # an adapter is all that it makes
        save_adapter(model, folder, base)
        shutil.copyfile(str(bottleneck_adapter.__file__), folder / "bottleneck_adapter.py")
