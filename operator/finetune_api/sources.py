"""Where the model and the data come from, where the results go, and which Secrets open them."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from finetune_api.fields import (
    ConfigMapKey,
    DataUri,
    ModelUri,
    ObjectName,
    Revision,
    SpecModel,
    StorageUri,
    check,
    check_exactly_one,
    exactly_one,
    rule,
    rules,
)


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


_SECRET_NEEDS_REMOTE = rule(
    "!has(self.secretRef) || (has(self.source) && (self.source.startsWith('hf://') || self.source.startsWith('s3://')))",
    "secretRef goes with an hf:// or s3:// source",
)


def _check_secret(secret: SecretReference | None, source: str | None) -> None:
    check(secret is None or (source or "").startswith(("hf://", "s3://")), _SECRET_NEEDS_REMOTE["message"])


class ModelSource(SpecModel):
    """The base model, in safetensors, with its tokenizer."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!has(self.revision) || self.source.startsWith('hf://')", "revision goes with an hf:// source"),
            _SECRET_NEEDS_REMOTE,
        )
    )

    source: ModelUri
    """Where the model is: hf://owner/name, pvc://claim/path or s3://bucket/path. Local runs also take file://path."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub model. It is resolved to a commit, which status.resolved records."""
    secret_ref: SecretReference | None = None
    """Secret with the key `token` (hub), or `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""

    @model_validator(mode="after")
    def _fits_source(self) -> Self:
        check(self.revision is None or self.source.startswith("hf://"), "revision goes with an hf:// source")
        _check_secret(self.secret_ref, self.source)
        return self


class DataSource(SpecModel):
    """One file, or one folder of files of one form. Exactly one of source and configMap."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("source", "configMap"), _SECRET_NEEDS_REMOTE))

    source: DataUri | None = None
    """Where the data is: pvc://claim/path, s3://bucket/path or hf://datasets/owner/name/path. Local runs also take file://path."""
    config_map: ConfigMapSource | None = None
    """Data that stands in a ConfigMap."""
    secret_ref: SecretReference | None = None
    """Secret with the key `token` (hub), or `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_exactly_one(self, "source", "configMap")
        _check_secret(self.secret_ref, self.source)
        return self


class ValidationSource(SpecModel):
    """Data for the validation loss: a fraction held out of the training data, or data of its own."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("fraction", "source", "configMap"), _SECRET_NEEDS_REMOTE))

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
        _check_secret(self.secret_ref, self.source)
        return self

    def data_source(self) -> DataSource | None:
        """The data of its own, or None where a fraction of the training data is held out."""
        if self.fraction is not None:
            return None
        return DataSource.model_construct(source=self.source, config_map=self.config_map, secret_ref=self.secret_ref)


_SECRET_NEEDS_S3 = rule("!has(self.secretRef) || self.storage.startsWith('s3://')", "secretRef goes with an s3:// storage")


class Output(SpecModel):
    """Where checkpoints and results go."""

    model_config = ConfigDict(json_schema_extra=rules(_SECRET_NEEDS_S3))

    storage: StorageUri
    """Folder for checkpoints, report and artifacts: pvc://claim/path or s3://bucket/path. Local runs also take file://path."""
    secret_ref: SecretReference | None = None
    """Secret with the keys `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""

    @model_validator(mode="after")
    def _secret_fits_storage(self) -> Self:
        check(self.secret_ref is None or self.storage.startswith("s3://"), _SECRET_NEEDS_S3["message"])
        return self
