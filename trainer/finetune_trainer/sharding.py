"""A model of which each worker holds a part: torch's fully_shard (FSDP2), a group for each decoder layer and one for the rest.

A layer's weights are gathered when it computes and dropped after; its gradients are summed over the workers and shared out on the way
back. Gradients are sums, as everywhere here: the loss is already divided by the units of the global batch.

Embeddings, last norm and output layer are one group, gathered while the model computes, since the objectives use the output layer's
weight themselves. What PEFT keeps outside of the transformers model (the encoder of a soft prompt) stays whole on every worker.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer.parts import gathered

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_DECODE = "decode_only"
"""The method of a sharded transformers model that runs its decoder."""


def shard(transformer: "PreTrainedModel", device: torch.device) -> None:
    """Shard a model over all workers of the process group, in place. Every worker calls it with the same weights.

    The parameters become DTensors, of which each worker keeps its rows on its device.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh: DeviceMesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder_layers(transformer):
        fully_shard(layer, mesh=mesh)
    fully_shard(transformer, mesh=mesh)
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # plain sums are what every backend has

    def decode(**arguments: Any) -> Any:  # noqa: ANN401 - whatever the model takes and gives
        return transformer.get_decoder()(**arguments)

    setattr(transformer, _DECODE, decode)
    register_fsdp_forward_method(transformer, _DECODE)


def decoder_layers(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that a decoder goes through one after the other: the longest list of modules of one class."""
    lists: list[list[torch.nn.Module]] = [list(module) for module in transformer.modules() if isinstance(module, torch.nn.ModuleList)]
    alike = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    return max(alike, key=len, default=[])


def decoder_of(transformer: "PreTrainedModel") -> Callable[..., Any]:
    """A sharded model's way through its decoder alone."""
    decode: Callable[..., Any] = getattr(transformer, _DECODE)
    return decode


def gather_root(transformer: "PreTrainedModel") -> None:
    """Have embeddings and output layer whole, for those who use them themselves."""
    module: Any = transformer
    module.unshard()


def drop_gathered(transformer: "PreTrainedModel") -> None:
    """Drop what was gathered: the parameters are the workers' parts again, and may be changed."""
    from torch.distributed.fsdp import FSDPModule

    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole(module: torch.nn.Module, transformer: "PreTrainedModel", *, leads: bool) -> Iterator[None]:
    """Make a sharded model an ordinary one on the CPU of the worker that leads, for its method to export. Every worker calls it.

    One parameter after the other is gathered. The model is not to be computed with any more.
    """
    drop_gathered(transformer)
    made: dict[int, torch.nn.Parameter] = {}  # by identity: tied weights stay one tensor, which is how they are recognised
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                tensor = gathered(parameter)
                kept = tensor.to("cpu") if leads else torch.empty_like(tensor, device="meta")
                made[id(parameter)] = torch.nn.Parameter(kept, requires_grad=parameter.requires_grad)
            owner._parameters[name] = made[id(parameter)]
    for owner in transformer.modules():
        _become_ordinary(owner)
    yield


def _become_ordinary(module: torch.nn.Module) -> None:
    """Give a module its own class back, whose name is written into the model's configuration."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.__class__ = next(  # type: ignore[assignment]  # the class that it had
            each for each in type(module).__mro__ if not issubclass(each, FSDPModule)
        )
