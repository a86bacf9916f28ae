"""From a job and the sizes of its model to a plan: whether it fits, how many steps, about how long. Arithmetic, no model and no GPU.

Both who only has the model's config.json and who has built the model itself ask here; the sizes are all that they bring.
"""

from dataclasses import dataclass
from typing import Any, Literal

from finetune_api.architecture import Architecture
from finetune_api.counting import Counts, counts_of
from finetune_api.estimate import (
    AUTO_TOKENS,
    STATE_SHARE,
    USABLE_SHARE,
    Activations,
    Held,
    Shape,
    State,
    kept_by,
    logits_bytes,
    plan_activations,
)
from finetune_api.gpus import Gpu
from finetune_api.status import MemoryParts, Plan
from finetune_api.v1alpha1 import Compute, Spec

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEFAULT_UTILISATION = 0.4
"""Share of the peak that a well-fed training of a decoder reaches (Chowdhery et al. 2022, table 3: 0.21 to 0.46)."""


@dataclass(frozen=True)
class ModelSizes:
    """The model of a job under its method."""

    shape: Shape
    counts: Counts
    embeddings: int
    """Parameters of the input embeddings, which are looked up and not multiplied with."""
    tied: bool
    """Whether the output layer's weights are the embeddings'."""
    head_trains: bool
    dtype: str | None
    """Number format of the published weights."""


@dataclass(frozen=True)
class Device:
    """What the job's workers compute with."""

    kind: str
    """cuda or cpu."""
    gpu: Gpu | None = None
    """Where it is known."""


@dataclass(frozen=True)
class Counted:
    """The training examples."""

    tokens: int
    sequences: int
    """Rows that an epoch goes through."""


def sizes_of(architecture: Architecture, spec: Spec) -> ModelSizes:
    """The sizes as the configuration alone has them. Raises UnknownArchitectureError by way of the architecture."""
    counts = counts_of(architecture, spec.method)
    each, embedding, head = architecture, architecture.modules[0], architecture.modules[-1]
    freeze = spec.method.freeze
    trains = spec.method.full is not None or (freeze is not None and (freeze.head or (head.tied and freeze.embeddings)))
    shape = Shape(each.layers, each.hidden, each.inner, each.keys, each.vocabulary)
    return ModelSizes(shape, counts, embedding.parameters, head.tied, trains, each.dtype)


def holds_teacher(spec: Spec) -> bool:
    """Whether a teacher that is a model stands beside the one that is tuned while it trains: not where its logits are kept before."""
    distillation = spec.objective.distillation
    if distillation is None or distillation.teacher.source is None:
        return False
    response, more = distillation.response, (distillation.feature, distillation.relation)
    return any(form is not None for form in more) or response is None or response.top_k is None


def processes_of(compute: Compute) -> int:
    """Processes that train: one for each GPU of each worker, or one for a worker without."""
    gpus = sum(int(amount) for name, amount in compute.resources_per_worker.items() if name.endswith("/gpu"))
    return compute.workers.max * max(1, gpus)


def device_of(spec: Spec, gpu: Gpu | None) -> Device:
    """The device of the workers; a known GPU is one that the job asks for, or that is assumed."""
    asked = any(name.endswith("/gpu") and int(amount) for name, amount in spec.compute.resources_per_worker.items())
    return Device("cuda" if asked or gpu else "cpu", gpu)


def precision_of(spec: Spec, device: Device) -> str:
    """What training.precision comes to."""
    if spec.training.precision != "auto":
        return spec.training.precision
    return "float32" if device.kind == "cpu" else device.gpu.precision if device.gpu else "bfloat16"


def loses_precision(spec: Spec, dtype: str | None, precision: str) -> bool:
    """Whether frozen weights held in the computation's format would lose something of a whole model that is published."""
    return any(kind in ("model", "merged") for kind in spec.artifacts) and dtype != precision


@dataclass(frozen=True)
class Given:
    """What a plan follows from beside job and model."""

    device: Device
    data: Counted | None = None
    teacher: int = 0
    """Parameters of a teacher that is held beside the model."""
    utilisation: float = DEFAULT_UTILISATION
    """Share of the GPU's peak that the training is taken to reach."""


def plan_of(spec: Spec, model: ModelSizes, given: Given) -> Plan:
    """The plan of a job."""
    device = given.device
    processes, precision = processes_of(spec.compute), precision_of(spec, device)
    compute, memory = SIZES[precision], device.gpu.memory if device.gpu else None
    frozen = 4 if spec.method.full is not None or loses_precision(spec, model.dtype, precision) else compute
    state = State(model.counts, frozen, compute, spec.model.quantization)
    strategy = _strategy(spec, state, processes, memory)
    if strategy == "fsdp":
        ends = model.embeddings * (1 if model.tied else 2)
        gathered = ends + 2 * (model.counts.own - ends) // max(1, model.shape.layers)
        state = State(model.counts, frozen, compute, spec.model.quantization, processes, gathered)
    held = Held(model.shape, kept_by(spec.method), compute, model.counts.trained_layers)
    logits = logits_bytes(model.shape, compute, device.kind, head_trains=model.head_trains, head_size=4 if model.head_trains else frozen)
    fixed = state.memory().model_copy(update={"logits": logits, "teacher": given.teacher * compute})
    chosen = _activations(spec, held, device, memory, _sum(fixed))
    rows = _rows(spec, chosen, processes)
    longest = spec.training.max_sequence_length
    parts = _with_activations(fixed, held, rows * longest, recomputed=chosen.recomputed)
    least = _with_activations(fixed, held, longest, recomputed=spec.training.gradient_checkpointing != "never")
    plan = Plan(
        parameters=model.counts.own + model.counts.added,
        trained_parameters=model.counts.trained + model.counts.added,
        processes=processes,
        strategy=strategy,
        gradient_checkpointing=chosen.recomputed,
        micro_batch_size=rows,
        memory_per_gpu=parts,
        least_memory_per_gpu=least.total,
        gpu=device.gpu.name if device.gpu else None,
        gpu_memory=memory,
        fits=None if memory is None else least.total <= USABLE_SHARE * memory,
    )
    return _with_time(plan, spec, model, given)


def _strategy(spec: Spec, state: State, processes: int, memory: int | None) -> Literal["ddp", "fsdp"]:
    """compute.strategy; auto is fsdp where one GPU holds not all of weights, gradients and moments."""
    strategy, lora = spec.compute.strategy, spec.method.lora
    if strategy != "auto" or processes == 1 or memory is None:
        return "fsdp" if strategy == "fsdp" and processes > 1 else "ddp"
    if spec.model.quantization != "none" or (lora is not None and lora.variant == "pissa"):
        return "ddp"
    return "fsdp" if _sum(state.memory()) > STATE_SHARE * memory else "ddp"


def _activations(spec: Spec, held: Held, device: Device, memory: int | None, taken: int) -> Activations:
    """As the worker will choose, where the GPU is known; else as many tokens as are wanted, recomputed only where the spec says so."""
    training = spec.training
    if memory is None:
        return Activations(training.gradient_checkpointing == "always", max(AUTO_TOKENS[device.kind], training.max_sequence_length))
    return plan_activations(held, training, max(0, memory - taken))


def _rows(spec: Spec, chosen: Activations, processes: int) -> int:
    """Sequences that a process holds at once: no more than it has of a global batch."""
    training = spec.training
    size = chosen.tokens // training.max_sequence_length if training.micro_batch_size == "auto" else training.micro_batch_size
    return max(1, min(size, -(-training.global_batch_size // processes)))


def _with_activations(fixed: MemoryParts, held: Held, tokens: int, *, recomputed: bool) -> MemoryParts:
    parts = fixed.model_copy(update={"activations": held.bytes(tokens, fixed.logits, recomputed=recomputed)})
    return parts.model_copy(update={"total": _sum(parts)})


def _sum(parts: MemoryParts) -> int:
    return sum(value for name, value in parts if name != "total")


def _with_time(plan: Plan, spec: Spec, model: ModelSizes, given: Given) -> Plan:
    """The plan with its steps, and with hours where the GPU is known."""
    data, gpu, training = given.data, given.device.gpu, spec.training
    if data is None:
        return plan
    steps = training.epochs * -(-data.sequences // training.global_batch_size)
    flops = float(training.epochs * data.tokens * _flops_per_token(model, recomputed=plan.gradient_checkpointing))
    changes: dict[str, Any] = {"tokens_per_epoch": data.tokens, "sequences": data.sequences, "steps": steps, "training_flops": flops}
    if gpu is not None and gpu.teraflops:
        gpu_hours = flops / (gpu.teraflops * 1e12 * given.utilisation) / 3600
        changes |= {"hours": gpu_hours / plan.processes, "gpu_hours": gpu_hours}
    return plan.model_copy(update=changes)


def _flops_per_token(model: ModelSizes, *, recomputed: bool) -> float:
    """Two operations for each weight that is multiplied with: forward, back to the inputs, and to the gradient of a weight that trains.

    That is 6 N in all where everything trains (Kaplan et al. 2020, section 2.1), and 4 N under LoRA; 2 N more where activations are
    recomputed. Attention itself is left out.
    """
    counts = model.counts
    multiplied = counts.own + counts.added - (0 if model.tied else model.embeddings)
    through = counts.trained_layers / max(1, model.shape.layers)
    trained = min(counts.trained + counts.added, multiplied)
    return 2 * multiplied * (1 + through * (2 if recomputed else 1)) + 2 * trained
