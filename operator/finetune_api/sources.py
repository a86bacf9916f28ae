"""Where models and data come from, who serves a model, where the results go, and which Secrets open them."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_api.fields import (
    ConfigMapKey,
    DataUri,
    EndpointUrl,
    ModelUri,
    ObjectName,
    ProfileName,
    Revision,
    ServedModel,
    SpecModel,
    SplitName,
    StorageUri,
    SubsetName,
    check,
    check_distinct,
    check_exactly_one,
    exactly_one,
    rule,
    rules,
)
from finetune_api.status import ArtifactKind


class SecretReference(SpecModel):
    """A Secret in the job's namespace."""

    name: ObjectName
    """Name of the Secret."""


SECRET_NEEDS_REMOTE = rule(
    "!has(self.secretRef) || (has(self.source) && (self.source.startsWith('hf://') || self.source.startsWith('s3://')))",
    "secretRef goes with an hf:// or s3:// source",
)


def check_secret(secret: SecretReference | None, source: str | None) -> None:
    """SECRET_NEEDS_REMOTE in Python. Raises ValueError."""
    check(secret is None or (source or "").startswith(("hf://", "s3://")), SECRET_NEEDS_REMOTE["message"])


REVISION_NEEDS_HUB = rule(
    "!has(self.revision) || (has(self.source) && self.source.startsWith('hf://'))", "revision goes with an hf:// source"
)


def check_revision(revision: str | None, source: str | None) -> None:
    """REVISION_NEEDS_HUB in Python. Raises ValueError."""
    check(revision is None or (source or "").startswith("hf://"), REVISION_NEEDS_HUB["message"])


class ProfileReference(SpecModel):
    """A TuningProfile of the cluster."""

    name: ProfileName
    """Name of the TuningProfile."""


class ModelReference(SpecModel):
    """A model beside the one that is tuned, in safetensors, with its tokenizer."""

    model_config = ConfigDict(json_schema_extra=rules(REVISION_NEEDS_HUB, SECRET_NEEDS_REMOTE))

    source: ModelUri
    """Where the model is: hf://owner/name, pvc://claim/path or s3://bucket/path. Local runs also take file://path."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub model."""
    secret_ref: SecretReference | None = None
    """Secret with the key `token` (hub), or `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""

    @model_validator(mode="after")
    def _fits_source(self) -> Self:
        check_revision(self.revision, self.source)
        check_secret(self.secret_ref, self.source)
        return self

    def model_source(self) -> "ModelSource":
        """The same as a model to load."""
        return ModelSource.model_construct(source=self.source, revision=self.revision, secret_ref=self.secret_ref)


class ModelSource(SpecModel):
    """The base model, in safetensors, with its tokenizer."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            REVISION_NEEDS_HUB,
            SECRET_NEEDS_REMOTE,
        )
    )

    source: ModelUri
    """Where the model is: hf://owner/name, pvc://claim/path or s3://bucket/path. Local runs also take file://path."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub model. It is resolved to a commit, which status.resolved records."""
    secret_ref: SecretReference | None = None
    """Secret with the key `token` (hub), or `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Hold the frozen weights in four (nf4, Dettmers et al. 2023) or eight bits (int8), which needs a GPU; none holds them as they are."""
    trust_remote_code: bool = False
    """Run the Python code that lies beside the model's weights, in this job's pods. It needs a profile that says allowRemoteCode."""

    @model_validator(mode="after")
    def _fits_source(self) -> Self:
        check_revision(self.revision, self.source)
        check_secret(self.secret_ref, self.source)
        return self


class ConfigMapSource(SpecModel):
    """One key of a ConfigMap in the job's namespace."""

    name: ObjectName
    """Name of the ConfigMap."""
    key: ConfigMapKey
    """Key that holds the file; its ending (.jsonl, .json, .csv, .parquet) tells the file's form."""


_HUB_DATA_SET = "^hf://datasets/[^/]+/[^/]+/?$"
SPLIT_NEEDS_HUB = rule(
    f"(!has(self.split) && !has(self.subset)) || (has(self.source) && self.source.matches('{_HUB_DATA_SET}'))",
    "split and subset go with a source hf://datasets/owner/name, without a path",
)


def check_split(split: str | None, subset: str | None, source: str | None) -> None:
    """SPLIT_NEEDS_HUB in Python. Raises ValueError."""
    check((split is None and subset is None) or re.fullmatch(_HUB_DATA_SET, source or "") is not None, SPLIT_NEEDS_HUB["message"])


class DataSource(SpecModel):
    """One file, or one folder of files of one form. Exactly one of source and configMap."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("source", "configMap"), SECRET_NEEDS_REMOTE, SPLIT_NEEDS_HUB))

    source: DataUri | None = None
    """Where the data is: pvc://claim/path, s3://bucket/path or hf://datasets/owner/name/path. Local runs also take file://path."""
    config_map: ConfigMapSource | None = None
    """Data that stands in a ConfigMap."""
    split: SplitName | None = None
    """Split of a hub data set, such as train; it is read by its name, whatever its files are."""
    subset: SubsetName | None = None
    """Subset (configuration) of a hub data set."""
    secret_ref: SecretReference | None = None
    """Secret with the key `token` (hub), or `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_exactly_one(self, "source", "configMap")
        check_secret(self.secret_ref, self.source)
        check_split(self.split, self.subset, self.source)
        return self


class Endpoint(SpecModel):
    """A served model that answers as OpenAI's API does (vLLM, llama.cpp, most hosted services)."""

    url: EndpointUrl
    """Base address, to which /chat/completions is added: https://models.example.com/v1."""
    model: ServedModel
    """Name of the model in its requests."""
    secret_ref: SecretReference | None = None
    """Secret with the key `token`, which is sent as a bearer token; absent sends none."""
    max_tokens: Annotated[int, Field(ge=1, le=65536)] = 512
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Temperature that answers are sampled at; 0 takes the most probable token."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Most probable tokens at each place whose probabilities are learned from too; 0 learns from the text alone."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests at a time."""


_SECRET_NEEDS_S3 = rule(
    "!has(self.secretRef) || !has(self.storage) || self.storage.startsWith('s3://')", "secretRef goes with an s3:// storage"
)


class Output(SpecModel):
    """Where checkpoints and results go."""

    model_config = ConfigDict(json_schema_extra=rules(_SECRET_NEEDS_S3))

    storage: StorageUri | None = None
    """Folder for checkpoints, report and artifacts: pvc://claim/path or s3://bucket/path. Local runs also take file://path. Absent is
    what the profile offers."""
    secret_ref: SecretReference | None = None
    """Secret with the keys `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""
    artifacts: (
        Annotated[
            tuple[ArtifactKind, ...],
            Field(min_length=1, max_length=3, json_schema_extra={"x-kubernetes-list-type": "set"}),
            AfterValidator(check_distinct),
        ]
        | None
    ) = None
    """Results to publish: adapter (a PEFT folder, to put beside the base model), merged (the base model with the adapter worked in) or
    model (the tuned model). Absent is model for the methods full and freeze, adapter for all others."""

    @model_validator(mode="after")
    def _secret_fits_storage(self) -> Self:
        check(self.secret_ref is None or (self.storage or "s3://").startswith("s3://"), _SECRET_NEEDS_S3["message"])
        return self
