"""What a job's status tells of the model, the data, the training and its results."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.fields import StatusModel
from finetune_api.status_fields import Count, MeasureName, Text, Time, Uri


class ModelSummary(StatusModel):
    """The model that is tuned, counted."""

    parameters: Count = 0
    """Parameters in all, with what the method adds."""
    trained_parameters: Count = 0
    """Parameters that are trained."""


class TokenStatistics(StatusModel):
    """How long the training examples are, in tokens."""

    min: Count = 0
    """The shortest."""
    median: Count = 0
    """Half are no longer."""
    p95: Count = 0
    """Of twenty examples nineteen are no longer."""
    max: Count = 0
    """The longest."""


class DataSummary(StatusModel):
    """The examples, counted."""

    train: Count = 0
    """Examples to train on."""
    validation: Count = 0
    """Examples for the validation loss."""
    test: Count = 0
    """Examples for the comparison."""
    tokens: Count = 0
    """Tokens of the training examples."""
    rejected: Count = 0
    """Rows that could not be used and were left out."""
    duplicates: Count = 0
    """Examples that were left out because others say the same."""
    leaked: Count = 0
    """Training examples whose words also stand in what the model is measured on."""
    made: Count = 0
    """Training examples that data.preparation made."""
    made_samples: Annotated[tuple[Text, ...], Field(max_length=3)] = ()
    """Some that were made."""
    tokens_per_example: TokenStatistics | None = None
    """How long the training examples are."""


class Progress(StatusModel):
    """How far the training is."""

    percent: Annotated[int, Field(ge=0, le=100)] = 0
    """Share of the steps that is done, in percent."""
    step: Count = 0
    """Optimiser steps done."""
    total_steps: Count = 0
    """Optimiser steps in all."""
    epoch: Annotated[float, Field(ge=0)] = 0.0
    """Epochs done."""
    tokens_per_second: Annotated[float, Field(ge=0)] | None = None
    """Tokens of examples, padding not counted, over all workers."""
    eta_seconds: Count | None = None
    """Estimated time to the end of the training."""
    last_update_time: Time | None = None
    """When the trainer last reported."""
    last_step_time: Time | None = None
    """When the last step was seen to be done; absent while the workers load, compile, measure or save."""


class Metric(StatusModel):
    """The latest value of one measure; the history is Prometheus's."""

    name: MeasureName
    """Name as suite/measure: train/loss, validation/loss."""
    value: float
    """The value; never NaN or infinite."""
    step: Count | None = None
    """Optimiser step that it belongs to."""


class CheckpointRef(StatusModel):
    """A saved state of the training."""

    step: Count
    """Optimiser step after which it was saved."""
    uri: Uri
    """Where it is."""


class BestCheckpoint(CheckpointRef):
    """The saved state that did best on the validation data."""

    metric: MeasureName
    """Measure that it is best by: validation/loss."""
    value: float
    """Its value there; never NaN or infinite."""


class Checkpoints(StatusModel):
    """The saved states that matter."""

    latest: CheckpointRef | None = None
    """The newest complete one, which an interrupted training goes on from."""
    best: BestCheckpoint | None = None
    """The one with the lowest validation loss, which is kept; with training.earlyStopping it is what is measured and published."""


ArtifactKind = Literal["adapter", "merged", "model"]


class Artifact(StatusModel):
    """A result that was published."""

    kind: ArtifactKind
    """adapter: a PEFT folder to put beside the base model; merged: the base model with the adapter worked in; model: the tuned model."""
    uri: Uri
    """Where it is."""
    digest: Annotated[str, Field(max_length=80)]
    """sha256 over the manifest of its files."""
    bytes: Count
    """Size of its files."""
