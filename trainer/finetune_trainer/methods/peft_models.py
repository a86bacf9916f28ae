"""What the methods that PEFT holds share: putting one into a model, and writing it as PEFT's folders are, which the ecosystem loads."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.methods.whole_model import number_format, save_whole_model

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"
"""PEFT's name of the one adapter that a job trains."""


def with_adapter(model: torch.nn.Module, config: "PeftConfig", *, seed: int, field: str) -> torch.nn.Module:
    """The PEFT model around the frozen one; new parameters are float32 and follow from the seed.

    Raises JobError (InvalidSpec) naming the field where PEFT refuses the model.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT still asks for what transformers has renamed
        torch.manual_seed(seed)
        try:
            wrapped: torch.nn.Module = get_peft_model(cast("PreTrainedModel", model), config)
        except (ValueError, TypeError, KeyError) as error:
            detail = str(error).strip().splitlines()
            raise JobError(Reason.INVALID_SPEC, f"{field}: {detail[0] if detail else type(error).__name__}") from error
    for module in wrapped.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]  # autocast does it, and without the way through float32
    return wrapped


def save_adapter(model: torch.nn.Module, folder: Path, base: BaseModel) -> None:
    """Write a PEFT adapter folder: adapter_config.json, adapter_model.safetensors."""
    peft_model = cast("PeftModel", model)
    with named_after(base, peft_model.peft_config[ADAPTER]):
        # "auto" would ask the hub whether the vocabulary changed; it did not.
        peft_model.save_pretrained(str(folder), save_embedding_layers=False)


@contextmanager
def named_after(base: BaseModel, config: Any) -> Iterator[None]:  # noqa: ANN401 - a configuration of PEFT's, which has no types
    """The configuration tells of the model that the job named, not of the folder that it was loaded from."""
    before = config.base_model_name_or_path, config.revision
    config.base_model_name_or_path, config.revision = base.name, base.revision
    try:
        yield
    finally:
        config.base_model_name_or_path, config.revision = before


def save_merged(model: torch.nn.Module, folder: Path, base: BaseModel) -> None:
    """Write the base model with the adapter worked in, which is done in place: the PEFT model is not to be used any more."""
    peft_model: Any = model
    merged = peft_model.merge_and_unload().to(number_format(base))  # weight after weight, so that there never is a second model
    save_whole_model(merged, folder, base)


def tied_names(model: torch.nn.Module) -> set[str]:
    """Names of the modules whose weight is another module's too: what is worked into one would change the other."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {name for names in owners.values() if len(names) > 1 for name in names}


def check_mergeable(model: torch.nn.Module) -> None:
    """Raise JobError (InvalidSpec) where an adapter cannot be worked into the weights: they are another module's too."""
    tied = {name.removesuffix(".base_layer") for name in tied_names(model)}
    for name in sorted(getattr(getattr(model, "base_model", None), "targeted_module_names", ())):
        if f"base_model.model.{name}" in tied:
            why = f"{name} shares its weights with another module, which would be changed too"
            raise JobError(Reason.INVALID_SPEC, f"output.artifacts: merged cannot be made: {why}; publish the adapter alone")


@contextmanager
def without_recomputation(model: torch.nn.Module) -> Iterator[None]:
    """A model whose layers do not recompute their activations: layers that do drop a past that is handed over in a cache."""
    modules: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True
