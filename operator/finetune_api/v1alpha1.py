"""FineTuneJob v1alpha1: what a user may ask for. The docstring of each field is its description in the CRD and in `kubectl explain`.

A rule that needs more than one field stands twice, side by side: as CEL for `kubectl apply`, as a validator for everyone else.
A shared corpus of manifests (tests/data/jobs) proves that both give the same verdict.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from finetune_api import JOB_NAME_MAX
from finetune_api.compute import Compute, Toleration, Workers
from finetune_api.fields import (
    LABEL_PATTERN,
    LOCAL_RUN,
    ColumnName,
    LabelKey,
    LabelValue,
    ModulePattern,
    SpecModel,
    check,
    check_exactly_one,
    described,
    exactly_one,
    model_in,
    rule,
    rules,
)
from finetune_api.sources import ConfigMapSource, DataSource, ModelSource, Output, SecretReference, ValidationSource
from finetune_api.status import Status

__all__ = [
    "Checkpoint",
    "Compute",
    "ConfigMapSource",
    "Data",
    "DataSource",
    "FineTuneJob",
    "FullMethod",
    "LoraMethod",
    "Method",
    "ModelSource",
    "ObjectMeta",
    "Objective",
    "Output",
    "SecretReference",
    "SftObjective",
    "Spec",
    "Toleration",
    "Training",
    "ValidationSource",
    "Workers",
    "parse_job",
]


_COLUMNS_FIT_FORMAT = rule(
    "self.format == 'auto' || self.columns.all(key, "
    "self.format == 'promptCompletion' ? key in ['prompt', 'completion'] : key == self.format)",
    "columns may only rename fields of data.format",
)


class Data(SpecModel):
    """The examples: to train on, to validate while training, to test before and after."""

    model_config = ConfigDict(json_schema_extra=rules(_COLUMNS_FIT_FORMAT))

    train: DataSource
    """Examples to train on."""
    validation: ValidationSource = ValidationSource(fraction=0.1)
    """Examples that are never trained on; their loss is measured before, during and after the training."""
    test: DataSource | None = None
    """Examples that are only used for the comparison of the untuned and the tuned model."""
    format: Literal["auto", "messages", "promptCompletion", "text"] = "auto"
    """Form of a row: messages (a conversation, written with the model's chat template), promptCompletion or text.
    auto looks at the columns."""
    columns: Annotated[dict[Literal["messages", "prompt", "completion", "text"], ColumnName], Field(max_length=4)] = {}
    """Names of the data's own columns, by the field that they hold: {prompt: question, completion: answer}."""

    @model_validator(mode="after")
    def _columns_fit_format(self) -> Self:
        if self.format != "auto":
            wanted = {"prompt", "completion"} if self.format == "promptCompletion" else {self.format}
            check(set(self.columns) <= wanted, _COLUMNS_FIT_FORMAT["message"])
        return self


class FullMethod(SpecModel):
    """Every weight is trained."""


_ALL_LINEAR_ALONE = rule("!self.exists(name, name == 'all-linear') || self.size() == 1", "all-linear stands alone")


def _check_modules(names: tuple[str, ...]) -> tuple[str, ...]:
    check(len(set(names)) == len(names), "every name must stand once")
    check("all-linear" not in names or len(names) == 1, _ALL_LINEAR_ALONE["message"])
    return names


class LoraMethod(SpecModel):
    """Low-rank updates beside frozen weights (Hu et al. 2021, LoRA)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update of each weight matrix."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 32
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the update's inputs that is dropped while training."""
    target_modules: Annotated[
        tuple[ModulePattern, ...],
        Field(min_length=1, max_length=32, json_schema_extra={"x-kubernetes-list-type": "set", **rules(_ALL_LINEAR_ALONE)}),
        AfterValidator(_check_modules),
    ] = ("all-linear",)
    """Names of the modules that get an update; all-linear is every linear layer but the output layer."""


class Method(SpecModel):
    """How the weights change: exactly one."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("full", "lora")))

    full: FullMethod | None = None
    """Train every weight."""
    lora: LoraMethod | None = None
    """Train low-rank updates (LoRA)."""

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        check_exactly_one(self, "full", "lora")
        return self


class SftObjective(SpecModel):
    """Supervised fine-tuning: the cross-entropy of the next token."""

    loss_on: Literal["completion", "assistant", "all"] = "completion"
    """Tokens that count: the completion (of a conversation, its last assistant turn), every assistant turn, or all."""


class Objective(SpecModel):
    """What is minimised: exactly one."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("sft")))

    sft: SftObjective | None = None
    """Supervised fine-tuning."""

    @model_validator(mode="after")
    def _one_objective(self) -> Self:
        check_exactly_one(self, "sft")
        return self


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
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    seed: Annotated[int, Field(ge=0, le=2147483647)] = 42
    """Seed of the order of the examples, of the held-out fraction and of new weights."""


class Checkpoint(SpecModel):
    """How often the state of the training is saved."""

    every_steps: Annotated[int, Field(ge=1, le=1000000)] = 200
    """Optimiser steps between two checkpoints."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Newest complete checkpoints that are kept."""


def _immutable(*names: str) -> list[dict[str, str]]:
    """A spec says what ran, so it does not change; only what steers the run does."""
    return [rule(f"self.{name} == oldSelf.{name}", f"{name} is immutable") for name in names]


_A_SEQUENCE_FOR_EACH_WORKER = rule(
    "self.training.globalBatchSize >= self.compute.workers.max",
    "training.globalBatchSize must not be smaller than compute.workers.max: every worker needs a sequence",
)


class Spec(SpecModel):
    """What to tune, how, on what, and where the result goes."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *_immutable("model", "data", "method", "objective", "training", "checkpoint", "compute", "output"),
            *_immutable("backoffLimit"),
            rule("self.preRunningDeadlineSeconds >= oldSelf.preRunningDeadlineSeconds", "preRunningDeadlineSeconds can only be raised"),
            _A_SEQUENCE_FOR_EACH_WORKER,
            rule(
                "!has(self.activeDeadlineSeconds) || "
                "(has(oldSelf.activeDeadlineSeconds) && self.activeDeadlineSeconds >= oldSelf.activeDeadlineSeconds)",
                "activeDeadlineSeconds can only be raised or removed",
            ),
        )
    )

    model: ModelSource
    """The base model."""
    data: Data
    """The examples."""
    method: Method
    """How the weights change: exactly one of full, lora."""
    objective: Objective = Objective(sft=SftObjective())
    """What is minimised: exactly one of sft."""
    training: Training = Training()
    """The course of the training."""
    checkpoint: Checkpoint = Checkpoint()
    """How often the state of the training is saved."""
    compute: Compute = Compute()
    """The workers that train."""
    output: Output
    """Where checkpoints and results go."""
    suspend: bool = False
    """True takes the pods away after a checkpoint; false goes on from there."""
    backoff_limit: Annotated[int, Field(ge=0, le=100)] = 3
    """Failed attempts that are tried again. Preemptions do not count."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31536000)] | None = None
    """Longest time from the start of the job to its end; time in suspension does not count."""
    pre_running_deadline_seconds: Annotated[int, Field(ge=1, le=31536000)] = 1800
    """Longest time that an attempt waits for its pods to run."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=315360000)] | None = None
    """The job is deleted this long after its end; absent keeps it. Its artifacts stay."""

    @model_validator(mode="after")
    def _a_sequence_for_each_worker(self) -> Self:
        check(self.training.global_batch_size >= self.compute.workers.max, _A_SEQUENCE_FOR_EACH_WORKER["message"])
        return self


_JOB_NAME = f"a DNS label (lower-case letters, digits and inner hyphens), at most {JOB_NAME_MAX} characters"


class ObjectMeta(BaseModel):
    """The part of a Kubernetes object's metadata that this project reads."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)

    name: Annotated[str, Field(min_length=1, max_length=JOB_NAME_MAX, pattern=LABEL_PATTERN), described(_JOB_NAME)]
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[LabelKey, LabelValue] = {}
    annotations: dict[str, str] = {}


class FineTuneJob(BaseModel):
    """A language model to tune: from a base model and examples to a measured result."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    api_version: Annotated[Literal["finetune.dev/v1alpha1"], Field(alias="apiVersion")]
    kind: Literal["FineTuneJob"]
    metadata: ObjectMeta
    spec: Spec
    status: Status = Status()


def parse_job(manifest: Mapping[str, Any], *, local: bool = False) -> FineTuneJob:
    """A manifest as the API server would store it: checked, with every default in place.

    `local` also allows `file://` sources. Raises pydantic.ValidationError naming each field at fault.
    """
    text = json.dumps(_as_stored(manifest, FineTuneJob))
    return FineTuneJob.model_validate_json(text, by_alias=True, by_name=False, context=LOCAL_RUN if local else None)


@cache
def _parts(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """The fields of a model by their names in JSON, each with the model inside it. The operator asks at every look at every job."""
    return {field.alias or name: model_in(field.annotation) for name, field in model.model_fields.items()}


def _as_stored(value: Any, model: type[BaseModel] | None) -> Any:  # noqa: ANN401 - JSON
    """The value as the API server reads it: a known field that is null is absent, and 3.0 is the integer 3."""
    if isinstance(value, Mapping):
        fields = _parts(model) if model else None
        return {
            key: _as_stored(item, fields.get(key) if fields else None)
            for key, item in value.items()
            if item is not None or (fields and key not in fields)
        }
    if isinstance(value, (list, tuple)):
        return [_as_stored(item, model) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return value
