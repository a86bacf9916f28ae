"""What a plan tells before a GPU is asked for: whether the training fits, how many steps it takes, and about how long. Sizes are bytes."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.fields import StatusModel
from finetune_api.status_fields import Count

Amount = Annotated[float, Field(ge=0, le=1e30)]


class MemoryParts(StatusModel):
    """The peak memory of one process that trains, by what takes it. Each GPU of a worker has one process; a worker without GPUs is one."""

    weights: Count = 0
    """The model's weights, as they are held."""
    method: Count = 0
    """What the method adds to the weights: adapters, prompts."""
    gradients: Count = 0
    """A float32 gradient of each parameter that trains."""
    optimizer: Count = 0
    """AdamW's two float32 moments of each parameter that trains."""
    activations: Count = 0
    """What the forward pass over a micro-batch leaves for the backward pass, and the largest part of it that is computed again."""
    logits: Count = 0
    """The chunk of logits that exists at once, with its loss and slope."""
    teacher: Count = 0
    """The weights of a teacher that is held beside the model, and what it computes of a micro-batch."""
    total: Count = 0
    """All of it."""


class Plan(StatusModel):
    """What the job would take. Memory and time are estimates; steps and tokens are counted where the data was prepared."""

    parameters: Count = 0
    """Parameters in all, with what the method adds."""
    trained_parameters: Count = 0
    """Parameters that are trained."""
    processes: Count = 1
    """Processes that train, with compute.workers.max: one for each GPU."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Whether each process holds the whole model (ddp) or a part of it (fsdp)."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass."""
    micro_batch_size: Count = 1
    """Sequences of maxSequenceLength that a process holds at once."""
    memory_per_gpu: MemoryParts = MemoryParts()
    """Peak memory of a process with that micro-batch."""
    least_memory_per_gpu: Count = 0
    """Peak memory of a process with one sequence at once, its activations recomputed where the spec allows it."""
    gpu: Annotated[str, Field(max_length=64)] | None = None
    """GPU that the plan is for, where it is known: by the command's --gpu, or by a node selector that names it."""
    gpu_memory: Count | None = None
    """Memory of that GPU."""
    fits: bool | None = None
    """Whether the training fits into gpuMemory; absent where that is not known."""
    tokens_per_epoch: Count | None = None
    """Tokens of the training examples; absent where they were not counted."""
    sequences: Count | None = None
    """Rows that an epoch goes through: packed rows, or examples; absent where they were not counted."""
    steps: Count | None = None
    """Optimiser steps in all; absent where the data was not counted."""
    training_flops: Amount | None = None
    """Floating point operations of the training steps: 6 for each parameter and token, 4 where the parameter is frozen,
    2 more where activations are computed again."""
    hours: Amount | None = None
    """About how long the training steps take on that GPU, without waiting, measuring and publishing."""
    gpu_hours: Amount | None = None
    """The same times the GPUs."""
