"""Low-rank updates beside frozen weights (Hu et al. 2021), by PEFT, whose folders the ecosystem loads."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import LoraMethod
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Lora:
    """LoRA as the spec asks for it."""

    spec: LoraMethod

    freezes_base = True

    def apply(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        """The PEFT model around the frozen one; the updates are float32 and start as zero."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.spec.rank,
            lora_alpha=self.spec.alpha,
            lora_dropout=self.spec.dropout,
            target_modules=_targets(model, self.spec.target_modules),
        )
        with torch.random.fork_rng():
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


def _targets(model: torch.nn.Module, patterns: tuple[str, ...]) -> str | list[str]:
    """What PEFT is to look for: its shorthand, or the full names of the modules that the patterns name.

    A pattern is the end of a module's name (q_proj, self_attn.q_proj) and may hold `*`. Raises JobError naming a pattern without a module.
    """
    if patterns == (ALL_LINEAR,):
        return ALL_LINEAR
    if ALL_LINEAR in patterns:
        raise JobError(Reason.INVALID_SPEC, f"method.lora.targetModules: {ALL_LINEAR} stands alone or not at all")
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for pattern in patterns:
        expression = re.compile(r"(.*\.)?" + re.escape(pattern).replace(r"\*", ".*"))
        matches = [name for name in names if expression.fullmatch(name)]
        if not matches:
            problem = f"method.lora.targetModules: no module is called {pattern}; there are {_linear_names(model)}"
            raise JobError(Reason.MODEL_INVALID, problem)
        found += matches
    return sorted(set(found))


def _linear_names(model: torch.nn.Module) -> str:
    """The last parts of the linear layers' names, for a message."""
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    names = {name.rpartition(".")[2] for name, kind in modules if kind in ("Linear", "Conv1D")}
    return ", ".join(sorted(names)[:20]) or "no linear layers"
