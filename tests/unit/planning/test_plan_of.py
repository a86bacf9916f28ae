"""Plans worked out by hand: Llama 3.1 8B, whose sizes everybody knows."""

import json

import pytest
from tests.builders import raw_job

from finetune_api.architecture import architecture_of
from finetune_api.gpus import GPUS, gpu_of
from finetune_api.planning import Counted, Device, Given, device_of, holds_teacher, plan_of, sizes_of
from finetune_api.status import Plan
from finetune_api.v1alpha1 import Spec, parse_job

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
PARAMETERS = 8_030_261_248
PACKED = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
"""In linear layers but the output layer."""
LORA = 32 * 16 * (4 * 4096 + 2 * 4096 + 2 * 1024 + 3 * (4096 + 14336))
"""Rank 16 beside q, k, v, o, gate, up and down: 16 times the sum of inputs and outputs."""
GIB = 2**30
ONE_GPU = {"workers": {"min": 1, "max": 1}, "resourcesPerWorker": {"nvidia.com/gpu": 1}}


def spec_of(**given: object) -> Spec:
    return parse_job(raw_job(**{"compute": ONE_GPU, **given})).spec


def plan(gpu: str | None = None, data: Counted | None = None, **given: object) -> Plan:
    spec = spec_of(**given)
    known = GPUS[gpu] if gpu else None
    return plan_of(spec, sizes_of(architecture_of(LLAMA_8B), spec), Given(device_of(spec, known), data))


def test_lora_holds_its_frozen_weights_in_half_precision() -> None:
    found = plan()
    assert (found.parameters, found.trained_parameters) == (PARAMETERS + LORA, LORA)
    parts = found.memory_per_gpu
    assert (parts.weights, parts.method) == (2 * PARAMETERS, 4 * LORA)
    assert (parts.gradients, parts.optimizer) == (4 * LORA, 8 * LORA)
    assert parts.total == sum(value for name, value in parts if name != "total")
    assert (found.fits, found.gpu, found.steps) == (None, None, None)


def test_full_training_takes_16_bytes_a_parameter_and_a_copy_to_compute_with() -> None:
    parts = plan(method={"full": {}}).memory_per_gpu
    assert (parts.weights, parts.gradients, parts.optimizer) == ((4 + 2) * PARAMETERS, 4 * PARAMETERS, 8 * PARAMETERS)


@pytest.mark.parametrize(("kind", "size"), [("nf4", 0.516), ("int8", 1.0)])
def test_packed_weights(kind: str, size: float) -> None:
    parts = plan(model={"source": "hf://org/model", "quantization": kind}).memory_per_gpu
    assert parts.weights == int(size * PACKED) + 2 * (PARAMETERS - PACKED)


def test_sharded_weights_are_divided_by_the_workers_and_gathered_in_part() -> None:
    workers = {"workers": {"min": 8, "max": 8}, "resourcesPerWorker": {"nvidia.com/gpu": 1}, "strategy": "fsdp"}
    found = plan(method={"full": {}}, compute=workers)
    ends = 2 * 128256 * 4096
    gathered = ends + 2 * (PARAMETERS - ends) // 32
    assert (found.strategy, found.processes) == ("fsdp", 8)
    assert found.memory_per_gpu.weights == 4 * PARAMETERS // 8 + 4 * gathered
    assert found.memory_per_gpu.optimizer == PARAMETERS


def test_what_one_gpu_does_not_hold_is_sharded_by_itself() -> None:
    workers = {"workers": {"min": 4, "max": 4}, "resourcesPerWorker": {"nvidia.com/gpu": 2}}
    assert (plan("h100", compute=workers).strategy, plan("h100", method={"full": {}}, compute=workers).strategy) == ("ddp", "fsdp")
    assert plan("h100", compute=workers).processes == 8


def test_it_fits_or_not() -> None:
    assert plan("h100").fits is True
    assert plan("t4").fits is False
    assert plan("h100", method={"full": {}}).fits is False
    least = plan("l4", model={"source": "hf://org/model", "quantization": "nf4"})
    assert (least.fits, least.gradient_checkpointing) == (True, True)
    assert least.least_memory_per_gpu <= least.memory_per_gpu.total <= 0.92 * GPUS["l4"].memory


def test_a_process_holds_no_more_than_its_share_of_a_global_batch() -> None:
    assert plan("h200", training={"globalBatchSize": 4, "maxSequenceLength": 512}).micro_batch_size == 4
    assert plan("h200", training={"globalBatchSize": 64, "microBatchSize": 3}).micro_batch_size == 3


def test_steps_and_hours() -> None:
    """3 epochs of 10,000,000 tokens in 4,883 rows of 2,048: 306 steps of 16 each epoch.

    Multiplied with: all but the embeddings. 2 forward, 2 back; 2 more for what trains. On a GPU with 989.4 TFLOPS at 40 %.
    """
    found = plan("h100", Counted(10_000_000, 4883), training={"gradientCheckpointing": "never", "microBatchSize": 1})
    multiplied = PARAMETERS + LORA - 128256 * 4096
    flops = 30_000_000 * (4 * multiplied + 2 * LORA)
    assert (found.steps, found.training_flops) == (3 * 306, pytest.approx(flops))
    assert found.gpu_hours == pytest.approx(flops / (989.4e12 * 0.4) / 3600)
    again = plan("h100", Counted(10_000_000, 4883), training={"gradientCheckpointing": "always"})
    assert again.training_flops == pytest.approx(flops + 30_000_000 * 2 * multiplied)


def test_hours_are_shared_out_and_gpu_hours_are_not() -> None:
    two = {"workers": {"min": 2, "max": 2}, "resourcesPerWorker": {"nvidia.com/gpu": 1}}
    found = plan("h100", Counted(1_000_000, 500), compute=two)
    assert found.hours == pytest.approx(found.gpu_hours / 2)


def test_a_teacher_stands_beside_the_model_unless_its_logits_are_kept() -> None:
    distilled = {"teacher": {"source": "hf://org/teacher"}, "response": {}}
    spec = spec_of(objective={"distillation": distilled})
    assert holds_teacher(spec)
    kept = plan_of(spec, sizes_of(architecture_of(LLAMA_8B), spec), Given(Device("cuda"), teacher=1000)).memory_per_gpu
    assert kept.teacher == 2000
    assert not holds_teacher(spec_of(objective={"distillation": {**distilled, "response": {"topK": 16}}}))
    assert not holds_teacher(spec_of())


@pytest.mark.parametrize(
    ("selector", "name"),
    [
        ({"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}, "a100-80gb"),
        ({"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB"}, "a100-40gb"),
        ({"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}, "h100"),
        ({"nvidia.com/gpu.product": "NVIDIA-H100-PCIe"}, "h100-pcie"),
        ({"nvidia.com/gpu.product": "NVIDIA-H100-NVL"}, "h100-nvl"),
        ({"nvidia.com/gpu.product": "NVIDIA-H200"}, "h200"),
        ({"nvidia.com/gpu.product": "NVIDIA-H200-NVL"}, "h200-nvl"),
        ({"nvidia.com/gpu.product": "NVIDIA-L40S"}, "l40s"),
        ({"cloud.google.com/gke-accelerator": "nvidia-l4"}, "l4"),
        ({"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}, "a100-40gb"),
        ({"nvidia.com/gpu.product": "Tesla-T4"}, "t4"),
        ({"nvidia.com/gpu.product": "Tesla-V100-SXM2-16GB"}, "v100-16gb"),
        ({"nvidia.com/gpu.product": "Tesla-V100-PCIE-16GB"}, "v100-pcie-16gb"),
        ({"nvidia.com/gpu.product": "Tesla-V100-PCIE-32GB"}, None),
        ({"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb"}, None),
        ({"nvidia.com/gpu.product": "NVIDIA-GeForce-RTX-4090"}, None),
        ({"zone": "h100"}, None),
        ({}, None),
    ],
    ids=json.dumps,
)
def test_a_node_selector_names_the_gpu(selector: dict[str, str], name: str | None) -> None:
    found = gpu_of(selector)
    assert (found.name if found else None) == name


def test_peaks_are_dense_and_memory_is_what_the_driver_has_left() -> None:
    """Printed with sparsity in the data sheets: BFLOAT16 of the H100 (SXM, NVL, PCIe), the H200, the A100, the L40S, the A10 and the L4."""
    printed = {"h100": 1979, "h100-nvl": 1671, "h100-pcie": 1513, "h200": 1979, "h200-nvl": 1671, "a100-80gb": 624, "a100-40gb": 624}
    for name, sparse in (printed | {"a10": 250, "l4": 242}).items():
        assert GPUS[name].teraflops == pytest.approx(sparse / 2, abs=0.5)
    gigabytes = {
        "h100": 80,
        "h100-nvl": 94,
        "h100-pcie": 80,
        "h200": 141,
        "a100-80gb": 80,
        "a100-40gb": 40,
        "l40s": 48,
        "a10": 24,
        "l4": 24,
    }
    for name, size in (gigabytes | {"t4": 16, "v100-16gb": 16, "v100-pcie-16gb": 16}).items():
        assert 0.9 * size * 2**30 < GPUS[name].memory < 1.075 * size * 1e9
    singles = {"v100-16gb": 15.7, "v100-pcie-16gb": 14, "t4": 8.1}
    assert {name: GPUS[name].teraflops for name in singles} == singles, "single precision, as printed"


def test_a_gpu_without_bfloat16_computes_in_float32() -> None:
    assert plan("t4").memory_per_gpu.weights == 4 * PARAMETERS
    assert plan(compute={}).memory_per_gpu.weights == 4 * PARAMETERS
