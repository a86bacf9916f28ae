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

from finetune_trainer.parts import gathered, is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_DECODE = "decode_only"
"""The method of a sharded transformers model that runs its decoder."""


def shard(module: torch.nn.Module, transformer: "PreTrainedModel", device: torch.device) -> None:
    """Shard the transformers model in a module over all workers of the process group, in place. Every worker calls it.

    The weights are those of rank 0; the others' may be on the `meta` device. Layer after layer is sent whole, split, and let go of. The
    parameters of the transformers model become DTensors, of which each worker keeps its rows on its device.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh: DeviceMesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sending = _Sending(module, device)
    for part in (*decoder_layers(transformer), transformer):
        sending.send(part)
        fully_shard(part, mesh=mesh)
        sending.forget()
    sending.send(module)
    for each in transformer.modules():
        if isinstance(each, FSDPModule):
            each.set_gradient_divide_factor(1.0)
            each.set_force_sum_reduction_for_comms(True)  # plain sums are what every backend has

    def decode(**arguments: Any) -> Any:  # noqa: ANN401 - whatever the model takes and gives
        return transformer.get_decoder()(**arguments)

    setattr(transformer, _DECODE, decode)
    register_fsdp_forward_method(transformer, _DECODE)


class _Sending:
    """Gives every worker rank 0's parameters and buffers, part of a model after part. Tied weights stay one tensor."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        self._numbers = _agreed_numbers(module, device)
        self._parameters: dict[int, torch.nn.Parameter] = {}
        self._buffers: set[tuple[int, str]] = set()
        self._formats = _agreed_formats(module, device)

    def send(self, part: torch.nn.Module) -> None:
        """Put a part's parameters and buffers on the device, but for what is sharded already."""
        for owner in part.modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None and not is_sharded(parameter):
                    owner._parameters[name] = self._sent(owner, name, parameter)
            for name, buffer in list(owner._buffers.items()):
                if buffer is not None and (id(owner), name) not in self._buffers:
                    owner._buffers[name] = _from_first(buffer, self._formats[id(owner), name], self._device)
                    self._buffers.add((id(owner), name))

    def _sent(self, owner: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        number = self._numbers[id(owner), name]
        if number not in self._parameters:
            tensor = _from_first(parameter, self._formats[id(owner), name], self._device)
            self._parameters[number] = torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        return self._parameters[number]

    def forget(self) -> None:
        """Let go of what was sent: it has been split."""
        self._parameters.clear()


def _agreed_numbers(module: torch.nn.Module, device: torch.device) -> dict[tuple[int, str], int]:
    """A number for each parameter of rank 0; tied ones have the same.

    Without weights a model is tied as its configuration says; with weights that differ it is not.
    """
    import torch.distributed as dist

    first: dict[int, int] = {}
    places = {
        (id(owner), name): first.setdefault(id(parameter), len(first))
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    }
    numbers = torch.tensor(list(places.values()), dtype=torch.int64, device=device)
    dist.broadcast(numbers, src=0)
    return dict(zip(places, numbers.tolist(), strict=True))


def _agreed_formats(module: torch.nn.Module, device: torch.device) -> dict[tuple[int, str], torch.dtype]:
    """The number format that each parameter and buffer has on rank 0: a model without weights does not know which ones stay in float32."""
    import torch.distributed as dist

    tensors = {
        (id(owner), name): tensor
        for owner in module.modules()
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if tensor is not None
    }
    numbers = torch.tensor([_FORMATS.index(tensor.dtype) for tensor in tensors.values()], dtype=torch.int64, device=device)
    dist.broadcast(numbers, src=0)
    return {place: _FORMATS[number] for place, number in zip(tensors, numbers.tolist(), strict=True)}


_FORMATS = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@torch.no_grad()
def _from_first(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rank 0's tensor, on this worker's device."""
    import torch.distributed as dist

    leads = dist.get_rank() == 0
    whole = tensor.detach().to(device).contiguous() if leads else torch.empty(tensor.shape, dtype=dtype, device=device)
    dist.broadcast(whole.reshape(-1).view(torch.uint8), src=0)
    return whole


def decoder_layers(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that a decoder goes through one after the other: the list of modules that holds most of the parameters."""
    lists = [list(module) for module in transformer.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(parameter.numel() for layer in layers for parameter in layer.parameters()), default=[])


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
    originals: list[torch.nn.Parameter] = []  # alive, so that no identity is used again
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                tensor = gathered(parameter)
                kept = tensor.to("cpu") if leads else torch.empty_like(tensor, device="meta")
                originals.append(parameter)
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
