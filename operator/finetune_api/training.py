"""The course of the training, when it stops, and how often its state is saved."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.fields import SpecModel, described


class EarlyStopping(SpecModel):
    """The training stops when the validation loss no longer falls. It is measured at every checkpoint."""

    patience: Annotated[int, Field(ge=1, le=1000)]
    """Measurements in a row without a better loss after which the training stops."""
    min_delta: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """A loss is better when it is lower than the best so far by more than this."""


class Training(SpecModel):
    """The course of the training."""

    epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    """How often the training examples are gone through."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate of AdamW."""
    global_batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    """Sequences per optimiser step, over all workers, whatever their number.
    With packing a sequence is a filled row of maxSequenceLength tokens."""
    micro_batch_size: Annotated[
        Annotated[int, Field(ge=1, le=4096)] | Literal["auto"],
        described("an integer from 1 to 4096, or auto"),
        Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
    ] = "auto"
    """Sequences that a worker holds in memory at once, or auto."""
    max_sequence_length: Annotated[int, Field(ge=8, le=1048576)] = 2048
    """Longest sequence in tokens. A longer example is cut at its end; one without a label left is rejected."""
    packing: bool = True
    """Fill a sequence with several examples, which do not see each other."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the computation; auto is bfloat16 where a GPU has it, else float32."""
    scheduler: Literal["cosine", "linear", "constant", "warmupStableDecay", "inverseSqrt"] = "cosine"
    """Course of the learning rate after the warm-up: cosine and linear fall to zero, constant stays, warmupStableDecay stays
    and falls at the end, inverseSqrt falls with the root of the steps."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    seed: Annotated[int, Field(ge=0, le=2147483647)] = 42
    """Seed of the order of the examples, of the held-out fraction and of new weights."""
    early_stopping: EarlyStopping | None = None
    """Stop when the validation loss no longer falls, and measure and publish the best checkpoint instead of the last;
    absent trains all epochs."""
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    """Compute activations again in the backward pass instead of keeping them, which saves memory and costs time; auto does so when
    memory asks for it."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the model with torch.compile; auto does so where it helps."""


class Checkpoint(SpecModel):
    """How often the state of the training is saved."""

    every_steps: Annotated[int, Field(ge=1, le=1000000)] = 200
    """Optimiser steps between two checkpoints."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Newest complete checkpoints that are kept."""
