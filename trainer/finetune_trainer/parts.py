"""Tensors of which each worker holds some rows: what every other module needs to know of them.

A sharded tensor is torch's DTensor, split along its first dimension over all workers: worker r of n holds the r-th of n equal parts; where
they cannot be equal the last ones are smaller, or empty.
"""

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each worker holds only some rows."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this worker holds of a tensor: a view."""
    part: torch.Tensor = tensor.to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]
    return part.detach()


def own_rows(tensor: torch.Tensor) -> tuple[int, int]:
    """First row that this worker holds, and the row after its last; (0, 0) for a tensor without rows."""
    rows = tensor.shape[0] if tensor.ndim else 0
    if not is_sharded(tensor):
        return 0, rows
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    part = -(-rows // mesh.size())
    start = min(rows, part * mesh.get_local_rank())
    return start, min(rows, start + part)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor. Every worker calls it where the tensor is sharded."""
    whole: torch.Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole.detach()
