"""Low-rank updates beside frozen weights (Hu et al. 2021), by PEFT, whose folders the ecosystem loads."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import LoraMethod
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Lora:
    """LoRA as the spec asks for it."""

    spec: LoraMethod

    freezes_base = True
    virtual_tokens = 0

    def apply(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        """The PEFT model around the frozen one; the updates are float32 and start as zero."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.spec.rank,
            lora_alpha=self.spec.alpha,
            lora_dropout=self.spec.dropout,
            target_modules=target_modules(model, self.spec.target_modules),
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT still asks for what transformers has renamed
            torch.manual_seed(seed)
            try:
                wrapped: torch.nn.Module = get_peft_model(model, config)
            except ValueError as error:
                raise JobError(Reason.MODEL_INVALID, f"method.lora.targetModules: {str(error).splitlines()[0]}") from error
        for module in wrapped.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False  # type: ignore[assignment]  # autocast does it, and without the way through float32
        return wrapped

    def export(self, model: torch.nn.Module, folder: Path, base: BaseModel) -> Literal["adapter", "model"]:
        """A PEFT adapter folder: adapter_config.json, adapter_model.safetensors."""
        peft_model: Any = model
        config = peft_model.peft_config["default"]
        before = config.base_model_name_or_path, config.revision
        config.base_model_name_or_path, config.revision = base.name, base.revision
        try:
            # "auto" would ask the hub whether the vocabulary changed; it did not.
            peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        finally:
            config.base_model_name_or_path, config.revision = before
        return "adapter"


def target_modules(model: torch.nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the modules that get an update, as short as they can be: the last part where it means no other module.

    A pattern is the end of a module's name (q_proj, self_attn.q_proj) and may hold `*`; all-linear stands for every linear layer but the
    output layer. Raises JobError naming a pattern that means no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in patterns:
        expression = re.compile(r"(.*\.)?" + re.escape(pattern).replace(r"\*", ".*"))
        linear = _linear_layers(model)
        matches = linear if pattern == ALL_LINEAR else [name for name in names if expression.fullmatch(name)]
        if not matches:
            there_are = ", ".join(sorted({_last_part(name) for name in linear})[:20]) or "no linear layers"
            raise JobError(Reason.MODEL_INVALID, f"method.lora.targetModules: no module is called {pattern}; there are {there_are}")
        found.update(matches)
    ambiguous = {_last_part(name) for name in names if name not in found}
    return sorted({name if _last_part(name) in ambiguous else _last_part(name) for name in found})


def _linear_layers(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers but the output layer's. Conv1D is GPT-2's name for a linear layer."""
    head: object = cast("PreTrainedModel", model).get_output_embeddings()
    linear = [(name, module) for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    return [name for name, module in linear if module is not head]


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
