"""A model's RMS norms (Zhang and Sennrich 2019) on a CPU: some rows at a time, so that the steps of the formula meet them in the cache.

Step by step over the whole tensor, as the models have it, more than a dozen float32 tensors of its size travel to the memory and back for
each norm, forward and backward. Which modules are such norms is found out by trying: where the formula is another, the module keeps it.
"""

from types import MethodType
from typing import Any

import torch

PIECE_ELEMENTS = 1 << 17
"""Numbers that are taken at once: half a MiB in float32."""


def use_cpu_norms(model: torch.nn.Module) -> int:
    """Have a model's RMS norms computed in this way, in place. Returns how many of its modules are such."""
    found = 0
    known: dict[tuple[type, float], bool] = {}
    for module in model.modules():
        epsilon = _epsilon(module)
        if epsilon is None:
            continue
        kind = (type(module), epsilon)
        if kind not in known:
            known[kind] = _is_rms_norm(module, epsilon)
        if known[kind]:
            module.forward = MethodType(_forward, module)
            found += 1
    return found


def _epsilon(module: torch.nn.Module) -> float | None:
    """What is added to the mean square, of a module that holds a weight and nothing else; None of any other."""
    own = dict(module.named_parameters())
    if list(own) != ["weight"] or own["weight"].ndim != 1 or any(True for _ in (*module.children(), *module.buffers())):
        return None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


@torch.no_grad()
def _is_rms_norm(module: torch.nn.Module, epsilon: float) -> bool:
    """Whether it gives x w / sqrt(mean(x^2) + epsilon) for another weight than its own, and rows that epsilon is small and large beside."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(module.get_parameter("weight").shape, generator=generator)
    rows = torch.randn(4, len(weight), generator=generator) * torch.tensor([[0.0], [epsilon**0.5], [1.0], [100.0]])
    try:
        own = torch.func.functional_call(module, {"weight": weight}, (rows,))
    except (TypeError, RuntimeError):
        return False
    made: torch.Tensor = _RmsNorm.apply(rows, weight, epsilon)  # type: ignore[no-untyped-call]
    return isinstance(own, torch.Tensor) and own.shape == made.shape and torch.allclose(own, made, rtol=1e-4, atol=1e-6)


def _forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - as modules have it
    """x: [..., H]. Where anything else is asked of it, or a compiler looks on, the module does what its class says."""
    if args or kwargs or torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != module.weight.dtype:
        own: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
        return own
    made: torch.Tensor = _RmsNorm.apply(x, module.weight, _epsilon(module))  # type: ignore[no-untyped-call]
    return made


class _RmsNorm(torch.autograd.Function):
    """x w / sqrt(mean(x^2) + epsilon), rounded to x's number format before the weight as well as after it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:  # noqa: ANN401
        """x: [..., H]; weight: [H]."""
        rows, wide = x.reshape(-1, x.shape[-1]), torch.promote_types(x.dtype, torch.float32)
        output = torch.empty_like(rows)
        scale = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide).square_().div_(rows.shape[1]).add_(epsilon).rsqrt_()
        for part in _pieces(rows):
            output[part] = rows[part].to(wide, copy=True).mul_(scale[part])
            output[part].mul_(weight)
        ctx.save_for_backward(rows, weight, scale)
        return output.view(x.shape)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        rows, weight, scale = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        slopes = slope.reshape(rows.shape)
        grad_rows = torch.empty_like(rows) if for_x else None
        grad_weight = torch.zeros_like(weight, dtype=scale.dtype) if for_weight else None
        for part in _pieces(rows):
            normed = rows[part].to(scale.dtype, copy=True).mul_(scale[part])
            if grad_weight is not None:
                grad_weight += (normed * slopes[part]).sum(dim=0)
            if grad_rows is not None:
                by_normed = (slopes[part] * weight).to(scale.dtype)
                along = torch.linalg.vecdot(by_normed, normed).div_(-rows.shape[1])
                grad_rows[part] = by_normed.addcmul_(normed, along[:, None]).mul_(scale[part])
        grad_x = None if grad_rows is None else grad_rows.view(slope.shape)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _pieces(rows: torch.Tensor) -> list[slice]:
    size = max(1, PIECE_ELEMENTS // rows.shape[1])
    return [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
