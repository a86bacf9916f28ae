# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Bottleneck adapters for PEFT (Houlsby et al. 2019; Pfeiffer et al. 2021): this one file needs torch, transformers and peft alone.

After a block (attention, feed-forward) with the output h stands

    h + W_up f(W_down h + b_down) + b_up

where W_down makes the model's width smaller by a reduction factor, f is not linear, and W_up, b_up begin as zero, so that an adapted
model begins as it was. Everything else is frozen.

Importing this module registers the type BOTTLENECK with PEFT. From then on `get_peft_model`, `PeftModel.from_pretrained`,
`save_pretrained`, `load_adapter`, `set_adapter`, `disable_adapter` and `delete_adapter` know it as they know PEFT's own:

    import bottleneck_adapter
    model = PeftModel.from_pretrained(base, "folder/of/the/adapter")
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

NAME = "bottleneck"
NON_LINEARITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "temporal_block", "mixer", "mamba")
"""What architectures call the block of a layer that mixes positions."""
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")
"""What architectures call the block of a layer that treats each position by itself; OPT has none, but its last linear layer."""


def _peft_type() -> Any:
    """PEFT's enumeration of types with one member more: it offers no other way to a method that is not its own."""
    value = NAME.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_, member._value_ = value, value
        setattr(PeftType, value, member)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
        PeftType._member_names_.append(value)
    return PeftType[value]


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of a bottleneck adapter."""

    target_modules: Any = field(
        default=None,
        metadata={"help": "Blocks that an adapter stands after: ends of names, or a regular expression. Absent: by placement."},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Blocks that none stands after."})
    placement: str = field(
        default="pfeiffer", metadata={"help": "houlsby: after attention and feed-forward; pfeiffer: after feed-forward alone."}
    )
    reduction_factor: float = field(default=16.0, metadata={"help": "The bottleneck is the model's width divided by this, at least 1."})
    non_linearity: str = field(default="relu", metadata={"help": f"One of {', '.join(NON_LINEARITIES)}."})
    dropout: float = field(default=0.0, metadata={"help": "Share of the adapter's inputs that is dropped while training."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the up-projection begins as zero."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if self.placement not in ("houlsby", "pfeiffer"):
            raise ValueError(f"placement must be houlsby or pfeiffer, not {self.placement}")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(f"non_linearity must be one of {', '.join(NON_LINEARITIES)}, not {self.non_linearity}")
        if self.reduction_factor < 1:
            raise ValueError(f"reduction_factor must be at least 1, not {self.reduction_factor}")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A block with the adapters that stand after it, one for each name; the active ones change its output, one after the other."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_non_linearity", "bottleneck_dropout")

    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_width = width
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_non_linearity: dict[str, str] = {}
        self.bottleneck_dropout: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """What a layer asks of its block (an index, a flag) is the block's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter. W_down begins as any linear layer does."""
        inner = max(1, int(self.bottleneck_width / config.reduction_factor))
        device = next(self.base_layer.parameters()).device
        down, up = nn.Linear(self.bottleneck_width, inner), nn.Linear(inner, self.bottleneck_width)
        nn.init.zeros_(down.bias)
        if config.init_weights:
            nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        for holder, layer in ((self.bottleneck_down, down), (self.bottleneck_up, up)):
            holder[adapter_name] = layer if layer.weight.is_meta else layer.to(device)  # PEFT fills what it made without weights itself
        self.bottleneck_non_linearity[adapter_name] = config.non_linearity
        self.bottleneck_dropout[adapter_name] = config.dropout
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output, whatever its form, with the hidden states in it adapted: a tensor, or the first of a tuple."""
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        if isinstance(output, tuple):
            return (self._adapted(output[0]), *output[1:])
        return self._adapted(output)

    def _adapted(self, hidden: torch.Tensor) -> torch.Tensor:
        dtype = hidden.dtype
        for name in self.active_adapters:
            if name not in self.bottleneck_down:
                continue
            down, up = self.bottleneck_down[name], self.bottleneck_up[name]
            states = hidden if torch.is_autocast_enabled(hidden.device.type) else self._cast_input_dtype(hidden, down.weight.dtype)
            states = nn.functional.dropout(states, self.bottleneck_dropout[name], self.training)
            hidden = hidden + up(NON_LINEARITIES[self.bottleneck_non_linearity[name]](down(states))).to(dtype)
        return hidden

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters after its blocks."""

    prefix = f"{NAME}_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        """Write the blocks that the placement means into the configuration, where it names none."""
        if peft_config.target_modules is None:
            peft_config.target_modules = blocks_of(model, peft_config.placement)

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, _width(self.model))
        layer.set_adapter([adapter_name] if adapter_name in self.active_adapters else [])
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        """PEFT asks before it merges in any way: what is not linear cannot be worked into the weights."""
        raise ValueError("a bottleneck adapter cannot be merged: it is not linear")


def blocks_of(model: Any, placement: str) -> set[str]:
    """Full names of the blocks of every layer that the placement means, found by what layers call them.

    Raises ValueError telling what the layers are made of where there are none.
    """
    inside = set(model.get_decoder().modules()) if hasattr(model, "get_decoder") else set(model.modules())
    found: dict[tuple[str, ...], set[str]] = {ATTENTION: set(), FEED_FORWARD: set()}
    children: set[str] = set()
    stacks: list[str] = []
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList) or stack not in inside or any(name.startswith(f"{outer}.") for outer in stacks):
            continue  # what lies within a layer (experts) is a part of its blocks
        stacks.append(name)
        for index, layer in enumerate(stack):
            own = [key for key, _ in layer.named_children()]
            children.update(own)
            for kinds, names in found.items():
                names.update([f"{name}.{index}.{key}" for key in kinds if key in own][:1])
    wanted = (ATTENTION, FEED_FORWARD) if placement == "houlsby" else (FEED_FORWARD,)
    for kinds, what in ((ATTENTION, "attention"), (FEED_FORWARD, "feed-forward")):
        if kinds in wanted and not found[kinds]:
            there_are = ", ".join(sorted(children)) or "nothing with a name"
            raise ValueError(f"no {what} blocks are found in {type(model).__name__}: its layers hold {there_are}")
    return set().union(*(found[kinds] for kinds in wanted))


def _width(model: Any) -> int:
    """Size of the hidden states, of the text's part in a model of several."""
    return int(model.config.get_text_config().hidden_size)


if _peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name=NAME, config_cls=BottleneckConfig, model_cls=BottleneckModel)
