"""Where the model comes from, where the results go, and which Secrets open them."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_api.fields import ModelUri, ObjectName, Revision, SpecModel, StorageUri, check, check_distinct, rule, rules
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

    @model_validator(mode="after")
    def _fits_source(self) -> Self:
        check_revision(self.revision, self.source)
        check_secret(self.secret_ref, self.source)
        return self


_SECRET_NEEDS_S3 = rule("!has(self.secretRef) || self.storage.startsWith('s3://')", "secretRef goes with an s3:// storage")


class Output(SpecModel):
    """Where checkpoints and results go."""

    model_config = ConfigDict(json_schema_extra=rules(_SECRET_NEEDS_S3))

    storage: StorageUri
    """Folder for checkpoints, report and artifacts: pvc://claim/path or s3://bucket/path. Local runs also take file://path."""
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
        check(self.secret_ref is None or self.storage.startswith("s3://"), _SECRET_NEEDS_S3["message"])
        return self
