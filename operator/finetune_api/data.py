"""The examples: where they are, in what form, and which of them are held out."""

import re
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from finetune_api.fields import (
    ColumnName,
    ConfigMapKey,
    DataUri,
    ObjectName,
    SpecModel,
    SplitName,
    SubsetName,
    check,
    check_exactly_one,
    exactly_one,
    rule,
    rules,
)
from finetune_api.sources import SECRET_NEEDS_REMOTE, SecretReference, check_secret


class ConfigMapSource(SpecModel):
    """One key of a ConfigMap in the job's namespace."""

    name: ObjectName
    """Name of the ConfigMap."""
    key: ConfigMapKey
    """Key that holds the file; its ending (.jsonl, .json, .csv, .parquet) tells the file's form."""


_HUB_DATA_SET = "^hf://datasets/[^/]+/[^/]+/?$"
_SPLIT_NEEDS_HUB = rule(
    f"(!has(self.split) && !has(self.subset)) || (has(self.source) && self.source.matches('{_HUB_DATA_SET}'))",
    "split and subset go with a source hf://datasets/owner/name, without a path",
)


def _check_split(split: str | None, subset: str | None, source: str | None) -> None:
    check((split is None and subset is None) or re.fullmatch(_HUB_DATA_SET, source or "") is not None, _SPLIT_NEEDS_HUB["message"])


class DataSource(SpecModel):
    """One file, or one folder of files of one form. Exactly one of source and configMap."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("source", "configMap"), SECRET_NEEDS_REMOTE, _SPLIT_NEEDS_HUB))

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
        _check_split(self.split, self.subset, self.source)
        return self


class ValidationSource(SpecModel):
    """Data for the validation loss: a fraction held out of the training data, or data of its own."""

    model_config = ConfigDict(
        json_schema_extra=rules(exactly_one("fraction", "source", "configMap"), SECRET_NEEDS_REMOTE, _SPLIT_NEEDS_HUB)
    )

    fraction: Annotated[float, Field(gt=0, le=0.5)] | None = None
    """Share of the training examples that is held out, chosen by training.seed."""
    source: DataUri | None = None
    """Where the data is; as in train."""
    config_map: ConfigMapSource | None = None
    """Data that stands in a ConfigMap."""
    split: SplitName | None = None
    """Split of a hub data set; as in train."""
    subset: SubsetName | None = None
    """Subset of a hub data set; as in train."""
    secret_ref: SecretReference | None = None
    """Secret for the source; as in train."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_exactly_one(self, "fraction", "source", "configMap")
        check_secret(self.secret_ref, self.source)
        _check_split(self.split, self.subset, self.source)
        return self

    def data_source(self) -> DataSource | None:
        """The data of its own, or None where a fraction of the training data is held out."""
        if self.fraction is not None:
            return None
        return DataSource.model_construct(
            source=self.source, config_map=self.config_map, split=self.split, subset=self.subset, secret_ref=self.secret_ref
        )


_FIELDS: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "promptCompletion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
    "preference": frozenset({"prompt", "chosen", "rejected"}),
}
"""The fields of a row of each form."""

_COLUMNS_FIT_FORMAT = rule(
    "self.format == 'auto' || self.columns.all(key, "
    "self.format == 'promptCompletion' ? key in ['prompt', 'completion'] : "
    "self.format == 'preference' ? key in ['prompt', 'chosen', 'rejected'] : key == self.format)",
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
    format: Literal["auto", "messages", "promptCompletion", "text", "preference"] = "auto"
    """Form of a row: messages (a conversation, written with the model's chat template), promptCompletion, text, or preference (prompt,
    chosen and rejected, each a text or messages). auto looks at the columns."""
    columns: Annotated[
        dict[Literal["messages", "prompt", "completion", "text", "chosen", "rejected"], ColumnName], Field(max_length=6)
    ] = {}
    """Names of the data's own columns, by the field that they hold: {prompt: question, completion: answer}."""

    @model_validator(mode="after")
    def _columns_fit_format(self) -> Self:
        if self.format != "auto":
            check(set(self.columns) <= _FIELDS[self.format], _COLUMNS_FIT_FORMAT["message"])
        return self
