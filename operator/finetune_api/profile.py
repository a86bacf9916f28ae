"""TuningProfile v1alpha1: what a platform offers to the jobs that name it, and the bounds that these must keep."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from finetune_api.as_stored import as_stored
from finetune_api.compute import NodeSelector, Resources, Toleration, Tolerations
from finetune_api.evaluation import LmEvalTask
from finetune_api.fields import (
    LABEL_PATTERN,
    LabelKey,
    Quantity,
    QueueName,
    SpecModel,
    check,
    check_distinct,
    described,
    rule,
    rules,
)
from finetune_api.profile_fields import EndpointPrefix, S3Endpoint, SourcePrefix, StoragePrefix, StorageTemplate
from finetune_api.sources import SecretReference

PROFILE_KIND = "TuningProfile"
PROFILE_PLURAL = "tuningprofiles"
PROFILE_NAME_MAX = 63
DEFAULT_PROFILE = "finetune.dev/is-default-profile"
"""Annotation that is "true" on the profile of the jobs that name none."""

MethodName = Literal["full", "freeze", "lora", "adapter", "ia3", "promptTuning", "prefixTuning", "pTuning"]
ObjectiveName = Literal["sft", "distillation", "dpo"]
ImageName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=512, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$"),
    described("an image, such as registry.example.com/trainer:1.0 or .../trainer@sha256:..., at most 512 characters"),
]


class HeadResources(SpecModel):
    """Requests and limits of the head pod, which prepares, measures and publishes."""

    cpu: Quantity | None = None
    """CPUs; absent is the operator's setting."""
    memory: Quantity | None = None
    """Memory; absent is the operator's setting."""


class ProfileCompute(SpecModel):
    """What the workers of a job get."""

    node_selector: NodeSelector = {}
    """Labels of the nodes that may run a worker. A job adds to them; one that contradicts them is refused."""
    tolerations: Tolerations = ()
    """Taints that a worker tolerates, beside those that the job names."""
    resources_per_worker: Resources = {}
    """Requests and limits of each worker, for those resources that the job does not name."""


_SECRET_NEEDS_S3 = rule("!has(self.secretRef) || self.storage.startsWith('s3://')", "secretRef goes with an s3:// storage")


class ProfileOutput(SpecModel):
    """Where the results of a job go that does not say so."""

    model_config = ConfigDict(json_schema_extra=rules(_SECRET_NEEDS_S3))

    storage: StorageTemplate
    """Folder for checkpoints and results, such as pvc://models/{name} or s3://bucket/{namespace}/{name}: the words in braces stand for the
    job's."""
    secret_ref: SecretReference | None = None
    """Secret in the job's namespace with the keys `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""

    @model_validator(mode="after")
    def _secret_fits_storage(self) -> Self:
        check(self.secret_ref is None or self.storage.startswith("s3://"), _SECRET_NEEDS_S3["message"])
        return self


_SET: dict[str, Any] = {"x-kubernetes-list-type": "set"}
_LISTED = Field(max_length=64, json_schema_extra=_SET)


class Allowed(SpecModel):
    """What a job may name. A list that is absent allows everything, an empty one nothing.

    A URI is allowed where it begins with one of a list, segment by segment: hf://Qwen allows hf://Qwen/Qwen3-8B, not hf://Qwen-other/model.
    """

    models: Annotated[tuple[SourcePrefix, ...], _LISTED, AfterValidator(check_distinct)] | None = None
    """Models: the base model, teachers, encoders, generators and those of the baseline."""
    data: Annotated[tuple[SourcePrefix, ...], _LISTED, AfterValidator(check_distinct)] | None = None
    """Data: examples, suites, knowledge bases. ConfigMaps of the job's namespace are always allowed."""
    storage: Annotated[tuple[StoragePrefix, ...], _LISTED, AfterValidator(check_distinct)] | None = None
    """Places for results."""
    endpoints: Annotated[tuple[EndpointPrefix, ...], _LISTED, AfterValidator(check_distinct)] | None = None
    """Served models: teachers, generators and judges."""
    s3_endpoints: Annotated[tuple[S3Endpoint, ...], _LISTED, AfterValidator(check_distinct)] = ()
    """S3 servers beside AWS's own: what the key `endpoint` of a Secret may say, path included, where the list of models, data or storage
    bounds its s3:// URI. Absent it is empty."""
    lm_eval_tasks: (
        Annotated[tuple[LmEvalTask, ...], Field(max_length=256, json_schema_extra=_SET), AfterValidator(check_distinct)] | None
    ) = None
    """Tasks of lm-eval, which fetch data of their own; absent allows all where data is absent, else none."""
    methods: (
        Annotated[tuple[MethodName, ...], Field(min_length=1, max_length=8, json_schema_extra=_SET), AfterValidator(check_distinct)] | None
    ) = None
    """Methods."""
    objectives: (
        Annotated[tuple[ObjectiveName, ...], Field(min_length=1, max_length=3, json_schema_extra=_SET), AfterValidator(check_distinct)]
        | None
    ) = None
    """Objectives."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=64)] | None = None
    """Taints that a job may tolerate: one of the list, or of compute.tolerations, must tolerate all that the job's toleration does. No key
    is every key, Exists every value, no effect every effect; tolerationSeconds does not count."""
    node_selector_keys: Annotated[tuple[LabelKey, ...], _LISTED, AfterValidator(check_distinct)] | None = None
    """Labels that compute.nodeSelector of a job may name, beside those of the profile's own."""
    queues: Annotated[tuple[QueueName, ...], _LISTED, AfterValidator(check_distinct)] | None = None
    """Queues that a job's label may name, beside the profile's own `queue`, which must be set."""


class Limits(SpecModel):
    """What a job may ask for at most."""

    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Largest compute.workers.max."""
    gpus: Annotated[int, Field(ge=0, le=65536)] | None = None
    """GPUs of all workers: compute.workers.max times resourcesPerWorker. Every device but rdma/* counts as one."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31536000)] | None = None
    """Longest activeDeadlineSeconds, and that of a job that names none."""
    max_gpu_hours: Annotated[float, Field(gt=0, le=1e7)] | None = None
    """Largest maxGpuHours, and that of a job that names none."""


_QUEUES_NEED_QUEUE = rule(
    # The default of a spec is judged before its parts have theirs.
    "has(self.queue) || !has(self.allow) || !has(self.allow.queues)",
    "allow.queues goes with queue, which is that of the jobs that name none",
)


class ProfileSpec(SpecModel):
    """What the platform offers, and what it bounds."""

    model_config = ConfigDict(json_schema_extra=rules(_QUEUES_NEED_QUEUE))

    description: Annotated[str, Field(max_length=256)] | None = None
    """For people who choose a profile."""
    trainer_image: ImageName | None = None
    """Image of the pods; absent is the operator's setting."""
    head: HeadResources = HeadResources()
    """The head pod."""
    compute: ProfileCompute = ProfileCompute()
    """The workers."""
    queue: QueueName | None = None
    """Queue of the jobs whose labels name none: a LocalQueue of Kueue in the job's namespace, or a queue of Volcano."""
    output: ProfileOutput | None = None
    """Where results go; absent leaves it to the job."""
    allow: Allowed = Allowed()
    """What a job may name."""
    limits: Limits = Limits()
    """What a job may ask for at most."""
    allow_remote_code: bool = False
    """Whether a job may run the Python code that lies beside its model's weights (model.trustRemoteCode)."""

    @model_validator(mode="after")
    def _queues_beside_a_queue(self) -> Self:
        check(self.queue is not None or self.allow.queues is None, _QUEUES_NEED_QUEUE["message"])
        return self


_PROFILE_NAME = f"a DNS label (lower-case letters, digits and inner hyphens), at most {PROFILE_NAME_MAX} characters"


class ProfileMeta(BaseModel):
    """The part of a profile's metadata that this project reads."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)

    name: Annotated[str, Field(min_length=1, max_length=PROFILE_NAME_MAX, pattern=LABEL_PATTERN), described(_PROFILE_NAME)]
    generation: int = 1
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    annotations: dict[str, str] = {}


class TuningProfile(BaseModel):
    """What a platform team offers to the jobs of all namespaces: defaults, an allow-list and limits."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    api_version: Annotated[Literal["finetune.dev/v1alpha1"], Field(alias="apiVersion")]
    kind: Literal["TuningProfile"]
    metadata: ProfileMeta
    spec: ProfileSpec = ProfileSpec()

    @property
    def is_default(self) -> bool:
        """Whether jobs that name no profile get this one."""
        return self.metadata.annotations.get(DEFAULT_PROFILE) == "true"


def parse_profile(manifest: Mapping[str, Any]) -> TuningProfile:
    """A manifest as the API server would store it: checked, with every default in place. Raises pydantic.ValidationError."""
    kept = {key: value for key, value in manifest.items() if key != "status"}
    return TuningProfile.model_validate_json(json.dumps(as_stored(kept, TuningProfile)), by_alias=True, by_name=False)
