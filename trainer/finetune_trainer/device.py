"""What is known of the device that a worker computes on, for the metrics."""

from dataclasses import dataclass

import torch

_PEAK_TERAFLOPS = (
    ("B200", 2250.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("A100", 311.9),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
)
"""Part of a GPU's name to its dense bfloat16 matrix products, as the makers' data sheets have them (half of what they say with sparsity).
The longer name comes before its beginning."""


def peak_flops(name: str) -> float | None:
    """Floating point operations per second, in bfloat16, of the GPU of this name; None where it is not known."""
    return next((teraflops * 1e12 for part, teraflops in _PEAK_TERAFLOPS if part in name), None)


@dataclass(frozen=True)
class Device:
    """The device of a worker."""

    device: torch.device

    @property
    def memory_peak(self) -> int | None:
        """Most bytes that tensors have taken so far; None where that is not known, as on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    @property
    def peak_flops(self) -> float | None:
        """Floating point operations per second that it could do at best; None where that is not known."""
        return peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
