"""A linear layer with its low-rank update in one piece: PEFT's own layer in everything but the computation.

PEFT makes the update as a tensor of its own, scales it and adds it, which on the way to the memory and back costs more than the update's
products themselves. Here the product is added where the layer's own output is, forward and backward, and neither is kept.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch.nn import functional


def use_fused_linear(config: LoraConfig) -> None:
    """Have PEFT put its updates beside plain linear layers as `FusedLinear`."""
    config._register_custom_module({torch.nn.Linear: FusedLinear})


class FusedLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's layer; where anything but one plain update is asked of it, it does what PEFT does."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - as PEFT has it
        """x: [..., in features]. Returns [..., out features]."""
        active = self.active_adapters
        plain = not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
        if not plain or len(active) != 1 or active[0] not in self.lora_A or self.lora_bias[active[0]]:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        name, base = active[0], self.base_layer
        down, up, dropout = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name]
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        whole = x.to(dtype)
        thinned = None if isinstance(dropout, torch.nn.Identity) or not self.training else dropout(whole)
        bias = None if base.bias is None else base.bias.to(dtype)
        made: torch.Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
            whole, thinned, base.weight.to(dtype), bias, down.to(dtype), up.to(dtype), self.scaling[name]
        )
        return made


class _Fused(torch.autograd.Function):
    """x W' + b + s (x A') B', the base layer frozen."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - the layer's parts
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        thinned: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """x, thinned: [..., I]; weight: [O, I]; bias: [O]; down: [R, I]; up: [O, R]."""
        with torch.autocast(x.device.type, enabled=False):
            rows = (x if thinned is None else thinned).reshape(-1, x.shape[-1])
            low = rows @ down.T
            output = functional.linear(x.reshape(-1, x.shape[-1]), weight, bias)
            output.addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scale, ctx.thinned = scale, thinned is not None
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        rows, low, weight, down, up = ctx.saved_tensors
        for_x, for_thinned = ctx.needs_input_grad[:2]
        slopes = slope.reshape(-1, slope.shape[-1])
        low_slopes = (slopes @ up).mul_(ctx.scale)
        grad_down, grad_up = low_slopes.T @ rows, (slopes.T @ low).mul_(ctx.scale)
        grad_x = grad_thinned = None
        if for_x:
            grad_x = slopes @ weight
            if not ctx.thinned:
                grad_x.addmm_(low_slopes, down)
            grad_x = grad_x.view(*slope.shape[:-1], weight.shape[1])
        if for_thinned:
            grad_thinned = (low_slopes @ down).view(*slope.shape[:-1], weight.shape[1])
        return grad_x, grad_thinned, None, None, grad_down, grad_up, None
