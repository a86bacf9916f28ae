"""GPUs by name: their memory, and the dense peak of the format that is trained in.

Peaks are those of NVIDIA's data sheets: "H100 Tensor Core GPU" (SXM and NVL; the PCIe card from its first edition), "H200 Tensor Core GPU",
"A100 Tensor Core GPU", "L40S", "A10", "L4", "V100" (SXM2, PCIe) and "T4". Those of H100, H200 and L4 give BFLOAT16 with sparsity, which is
halved here. Memory is the total that nvidia-smi prints, which ECC and the driver make less than the data sheet's; of a V100 it is 16,160
MiB under old drivers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory: int
    """Bytes that its driver reports."""
    teraflops: float
    """Dense peak with tensor cores in bfloat16, or in float32 where it has no bfloat16."""
    precision: str = "bfloat16"
    """What training.precision auto comes to there."""


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 143_771 * MIB, 989.4),
        Gpu("h200-nvl", 143_771 * MIB, 835.5),
        Gpu("h100", 81_559 * MIB, 989.4),
        Gpu("h100-nvl", 95_830 * MIB, 835.5),
        Gpu("h100-pcie", 81_559 * MIB, 756.5),
        Gpu("a100-80gb", 81_920 * MIB, 312.0),
        Gpu("a100-40gb", 40_960 * MIB, 312.0),
        Gpu("l40s", 46_068 * MIB, 362.05),
        Gpu("a10", 23_028 * MIB, 125.0),
        Gpu("l4", 23_034 * MIB, 121.0),
        Gpu("v100-16gb", 16_384 * MIB, 15.7, "float32"),
        Gpu("v100-pcie-16gb", 16_384 * MIB, 14.0, "float32"),
        Gpu("t4", 15_360 * MIB, 8.1, "float32"),
    )
}
_LABELS = ("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator")
_MARKS = {
    "h200-nvl": ("h200", "nvl"),
    "h200": ("h200",),
    "h100-nvl": ("h100", "nvl"),
    "h100-pcie": ("h100", "pcie"),
    "h100": ("h100",),
    "a100-80gb": ("a100", "80gb"),
    "a100-40gb": ("a100",),
    "l40s": ("l40s",),
    "l4": ("l4",),
    "a10": ("a10",),
    "v100-pcie-16gb": ("v100", "pcie", "16gb"),
    "v100-16gb": ("v100", "16gb"),
    "t4": ("t4",),
}
"""What the words of a node label hold, in the order in which they are looked for: `NVIDIA-A100-SXM4-80GB`, `nvidia-tesla-t4`."""


def gpu_of(node_selector: Mapping[str, str]) -> Gpu | None:
    """The GPU that a node selector names, by the labels of NVIDIA's feature discovery and of GKE; None where it names none known here.

    A slice of one (`NVIDIA-A100-SXM4-40GB-MIG-1g.5gb`) is none that is known.
    """
    for label in _LABELS:
        words = node_selector.get(label, "").lower().split("-")
        if "mig" in words:
            return None
        for name, marks in _MARKS.items():
            if all(mark in words for mark in marks):
                return GPUS[name]
    return None
