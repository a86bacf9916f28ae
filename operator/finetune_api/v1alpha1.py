"""FineTuneJob v1alpha1: what a user may ask for. The docstring of each field is its description in the CRD and in `kubectl explain`.

A rule that needs more than one field stands twice, side by side: as CEL for `kubectl apply`, as a validator for everyone else.
A shared corpus of manifests (tests/data/jobs) proves that both give the same verdict.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune_api import API_VERSION, JOB_NAME_MAX, KIND
from finetune_api.fields import (
    LOCAL_RUN,
    ColumnName,
    ConfigMapKey,
    DataUri,
    LabelKey,
    LabelValue,
    ModelUri,
    ModulePattern,
    ObjectName,
    Quantity,
    Revision,
    SpecModel,
    StorageUri,
    check_exactly_one,
    exactly_one,
    rule,
    rules,
)
from finetune_api.status import Status


class SecretReference(SpecModel):
    """A Secret in the job's namespace."""

    name: ObjectName
    """Name of the Secret."""


class ConfigMapSource(SpecModel):
    """One key of a ConfigMap in the job's namespace."""

    name: ObjectName
    """Name of the ConfigMap."""
    key: ConfigMapKey
    """Key that holds the file; its ending (.jsonl, .json, .csv, .parquet) tells the file's form."""


class ModelSource(SpecModel):
    """The base model, in safetensors, with its tokenizer."""

    source: ModelUri
    """Where the model is: hf://owner/name, pvc://claim/path or s3://bucket/path. Local runs also take file://path."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub model. It is resolved to a commit, which status.resolved records."""
    secret_ref: SecretReference | None = None
    """Secret with the key `token` (hub), or `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""


_ONE_DATA_SOURCE = exactly_one("source", "configMap")


class DataSource(SpecModel):
    """One file, or one folder of files of one form. Exactly one of source and configMap."""

    model_config = ConfigDict(json_schema_extra=rules(_ONE_DATA_SOURCE))

    source: DataUri | None = None
    """Where the data is: pvc://claim/path, s3://bucket/path or hf://datasets/owner/name/path. Local runs also take file://path."""
    config_map: ConfigMapSource | None = None
    """Data that stands in a ConfigMap."""
    secret_ref: SecretReference | None = None
    """Secret with the key `token` (hub), or `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_exactly_one(self, "source", "configMap")
        return self


class ValidationSource(SpecModel):
    """Data for the validation loss: a fraction held out of the training data, or data of its own."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            exactly_one("fraction", "source", "configMap"),
            rule("!(has(self.fraction) && has(self.secretRef))", "secretRef goes with source"),
        )
    )

    fraction: Annotated[float, Field(gt=0, le=0.5)] | None = None
    """Share of the training examples that is held out, chosen by training.seed."""
    source: DataUri | None = None
    """Where the data is; as in train."""
    config_map: ConfigMapSource | None = None
    """Data that stands in a ConfigMap."""
    secret_ref: SecretReference | None = None
    """Secret for the source; as in train."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_exactly_one(self, "fraction", "source", "configMap")
        if self.fraction is not None and self.secret_ref is not None:
            raise ValueError("secretRef goes with source")
        return self

    def data_source(self) -> DataSource | None:
        """The data of its own, or None where a fraction of the training data is held out."""
        if self.fraction is not None:
            return None
        return DataSource.model_construct(source=self.source, config_map=self.config_map, secret_ref=self.secret_ref)


class Data(SpecModel):
    """The examples: to train on, to validate while training, to test before and after."""

    train: DataSource
    """Examples to train on."""
    validation: ValidationSource = ValidationSource(fraction=0.1)
    """Examples that are never trained on; their loss is measured before, during and after the training."""
    test: DataSource | None = None
    """Examples that are only used for the comparison of the untuned and the tuned model."""
    format: Literal["auto", "messages", "promptCompletion", "text"] = "auto"
    """Form of a row: messages (a conversation, written with the model's chat template), promptCompletion, text; auto looks at the columns."""
    columns: Annotated[dict[Literal["messages", "prompt", "completion", "text"], ColumnName], Field(max_length=4)] = {}
    """Names of the data's own columns, by the field that they hold: {prompt: question, completion: answer}."""


class FullMethod(SpecModel):
    """Every weight is trained."""


class LoraMethod(SpecModel):
    """Low-rank updates beside frozen weights (Hu et al. 2021, LoRA)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update of each weight matrix."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 32
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the update's inputs that is dropped while training."""
    target_modules: Annotated[tuple[ModulePattern, ...], Field(min_length=1, max_length=32)] = ("all-linear",)
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
    """Sequences per optimiser step, over all workers, whatever their number. With packing a sequence is a filled row of maxSequenceLength tokens."""
    micro_batch_size: Annotated[
        Annotated[int, Field(ge=1, le=4096)] | Literal["auto"],
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


class Workers(SpecModel):
    """Number of workers; min == max is a fixed size."""

    model_config = ConfigDict(json_schema_extra=rules(rule("self.min <= self.max", "min must not be larger than max")))

    min: Annotated[int, Field(ge=1, le=1024)] = 1
    """The training starts with no fewer."""
    max: Annotated[int, Field(ge=1, le=1024)] = 1
    """The training asks for so many."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError("min must not be larger than max")
        return self


class Toleration(SpecModel):
    """A toleration of the worker pods, as in a Pod."""

    key: LabelKey | None = None
    """Key of the taint; absent with operator Exists tolerates all."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Exists, or Equal (the value must match)."""
    value: LabelValue | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; absent is every effect."""
    toleration_seconds: Annotated[int, Field(ge=0, le=31536000)] | None = None
    """How long a NoExecute taint is tolerated."""


class Compute(SpecModel):
    """The workers that train."""

    workers: Workers = Workers()
    """Number of workers."""
    resources_per_worker: Annotated[dict[LabelKey, Quantity], Field(max_length=16)] = {}
    """Requests and limits of each worker, as in a Pod: {nvidia.com/gpu: 1, cpu: 8, memory: 64Gi}."""
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] = {}
    """Labels of the nodes that may run a worker."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] = ()
    """Taints that a worker tolerates."""


class Output(SpecModel):
    """Where checkpoints and results go."""

    storage: StorageUri
    """Folder for checkpoints, report and artifacts: pvc://claim/path or s3://bucket/path. Local runs also take file://path."""
    secret_ref: SecretReference | None = None
    """Secret with the keys `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""


def _immutable(*names: str) -> list[dict[str, str]]:
    """A spec says what ran, so it does not change; only what steers the run does."""
    return [rule(f"self.{name} == oldSelf.{name}", f"{name} is immutable") for name in names]


class Spec(SpecModel):
    """What to tune, how, on what, and where the result goes."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *_immutable("model", "data", "method", "objective", "training", "checkpoint", "compute", "output"),
            *_immutable("backoffLimit", "preRunningDeadlineSeconds"),
            rule(
                "!has(self.activeDeadlineSeconds) || (has(oldSelf.activeDeadlineSeconds) && self.activeDeadlineSeconds >= oldSelf.activeDeadlineSeconds)",
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


class ObjectMeta(BaseModel):
    """The part of a Kubernetes object's metadata that this project reads."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=None)

    name: Annotated[str, Field(min_length=1, max_length=JOB_NAME_MAX, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    resourceVersion: str = ""
    creationTimestamp: str | None = None
    deletionTimestamp: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class FineTuneJob(BaseModel):
    """A language model to tune: from a base model and examples to a measured result."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    api_version: Annotated[Literal["finetune.dev/v1alpha1"], Field(alias="apiVersion")] = API_VERSION
    kind: Literal["FineTuneJob"] = KIND
    metadata: ObjectMeta
    spec: Spec
    status: Status = Status()


def parse_job(manifest: Mapping[str, Any], *, local: bool = False) -> FineTuneJob:
    """A manifest as the API server would store it: checked, with every default in place.

    `local` also allows `file://` sources. Raises pydantic.ValidationError naming each field at fault.
    """
    return FineTuneJob.model_validate_json(json.dumps(manifest), context=LOCAL_RUN if local else None)
