"""Parts of a model by their names, and by what they are: the words in which methods say where they go."""

from typing import TYPE_CHECKING, cast

import torch

from finetune_api.architecture import module_pattern
from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
_SHOWN = 20
"""Names that an error lists at most."""


def matching_modules(model: torch.nn.Module, patterns: tuple[str, ...], field: str, *, offer_all: bool = False) -> set[str]:
    """Full names of the modules that patterns mean.

    A pattern is the end of a module's name (q_proj, self_attn.q_proj) and may hold `*`; all-linear stands for every linear layer but the
    output layer. Raises JobError (InvalidSpec) naming the field, a pattern that means no module, and the linear layers or all modules
    that there are.
    """
    names = [name for name, _ in model.named_modules() if name]
    linear = linear_layers(model)
    found: set[str] = set()
    for pattern in patterns:
        expression = module_pattern(pattern)
        matches = linear if pattern == ALL_LINEAR else [name for name in names if expression.fullmatch(name)]
        if not matches:
            offered = {last_part(name) for name in (names if offer_all else linear)}
            there_are = ", ".join(sorted(name for name in offered if not name.isdigit())[:_SHOWN]) or "no linear layers"
            raise JobError(Reason.INVALID_SPEC, f"{field}: no module is called {pattern}; there are {there_are}")
        found.update(matches)
    return found


def shortened(model: torch.nn.Module, found: set[str]) -> list[str]:
    """Names of modules as short as they can be: the last part where it means no other module. Sorted."""
    ambiguous = {last_part(name) for name, _ in model.named_modules() if name and name not in found}
    return sorted({name if last_part(name) in ambiguous else last_part(name) for name in found})


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers but the output layer's. Conv1D is GPT-2's name for a linear layer."""
    head: object = cast("PreTrainedModel", model).get_output_embeddings()
    linear = [(name, module) for name, module in model.named_modules() if is_linear(module)]
    return [name for name, module in linear if module is not head]


def decoder_layers(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The stack of a model's layers, with its name. Raises JobError (ModelInvalid) where there is none."""
    decoder = cast("PreTrainedModel", model).get_decoder()
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    inside = set(decoder.modules())
    own = [(name, stack) for name, stack in stacks if stack in inside and len(stack)]
    if not own:
        raise JobError(Reason.MODEL_INVALID, f"{type(model).__name__} has no layers that a method could be applied to")
    # Lists within a layer (experts) lie deeper than the layers themselves.
    return min(own, key=lambda entry: (entry[0].count("."), -len(entry[1])))


def last_part(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`."""
    return name.rpartition(".")[2]


def is_linear(module: torch.nn.Module) -> bool:
    """Linear layers of torch, GPT-2's, and those of bitsandbytes, which are linear layers of torch too."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
