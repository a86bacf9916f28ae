"""Base models and bounded field types. Every string, list and map is bounded, so that CEL's cost stays within the API server's limit."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, model_validator
from pydantic.alias_generators import to_camel

LOCAL_RUN = {"local": True}
"""Validation context of a run without Kubernetes, where `file://` sources are allowed."""


class SpecModel(BaseModel):
    """A part of a spec: frozen, typed strictly, unknown fields refused, `null` treated as the API server treats it."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        """The API server prunes a null where the schema has a default and refuses it elsewhere; so do we."""
        if not isinstance(data, dict):
            return data
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        kept = {}
        for key, value in data.items():
            field = fields.get(key)
            if value is not None or field is None:
                kept[key] = value
            elif field.is_required() or field.get_default(call_default_factory=True) is None:
                raise ValueError(f"{key} must not be null")
        return kept


class StatusModel(BaseModel):
    """A part of a status or a report: frozen; unknown fields are ignored, since operator and trainer may differ in version."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=True,
        use_attribute_docstrings=True,
    )

    def to_json(self) -> dict[str, Any]:
        """The plain JSON object, camelCase, without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def rule(cel: str, message: str) -> dict[str, str]:
    """One CEL rule for the schema; the model beside it checks the same in Python."""
    return {"rule": cel, "message": message}


def rules(*entries: dict[str, str]) -> dict[str, Any]:
    """The `json_schema_extra` that carries CEL rules into the CRD."""
    return {"x-kubernetes-validations": list(entries)}


def exactly_one(*names: str) -> dict[str, str]:
    """The CEL rule of a union by presence."""
    count = " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names)
    return rule(f"{count} == 1", f"exactly one of {', '.join(names)} must be set")


def check_exactly_one(model: BaseModel, *names: str) -> None:
    """The same rule in Python. Raises ValueError."""
    fields = {field.alias or name: name for name, field in type(model).model_fields.items()}
    if sum(getattr(model, fields[name]) is not None for name in names) != 1:
        raise ValueError(f"exactly one of {', '.join(names)} must be set")


def is_local(info: ValidationInfo) -> bool:
    """Whether the validation is for a run on this machine, without Kubernetes."""
    return bool(info.context and info.context.get("local"))


NAME_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
"""A Kubernetes object name (DNS subdomain, RFC 1123)."""

ObjectName = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=NAME_PATTERN)]
ConfigMapKey = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=r"^[-_a-zA-Z0-9][-._a-zA-Z0-9]*$")]
Revision = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][-A-Za-z0-9._/]*$")]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
ModulePattern = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.*-]+$")]
LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=317, pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")]
LabelValue = Annotated[str, StringConstraints(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]
Quantity = Annotated[
    int | Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")],
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]

_PLAIN_PATH = r"[A-Za-z0-9_.=+@-]+(/[A-Za-z0-9_.=+@-]+)*/?"
MODEL_URI = rf"^(hf://[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+|s3://{_PLAIN_PATH}|pvc://{_PLAIN_PATH})$"
DATA_URI = rf"^(hf://datasets/{_PLAIN_PATH}|s3://{_PLAIN_PATH}|pvc://{_PLAIN_PATH})$"
STORAGE_URI = rf"^(s3://{_PLAIN_PATH}|pvc://{_PLAIN_PATH})$"
FILE_URI = r"^file://(/|\./)?[^\x00:]+$"
URI_MAX = 1024

NO_PARENT_PATH = rule("!self.contains('..')", "a URI must not contain '..'")


def _uri(pattern: str) -> Any:
    """A bounded URI of the given form; `file://` only where the validation context says that the run is local."""

    def check(value: str, info: ValidationInfo) -> str:
        if is_local(info) and re.fullmatch(FILE_URI, value) and ".." not in value:
            return value
        if ".." in value:
            raise ValueError("a URI must not contain '..'")
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} is not a URI of a supported form ({pattern})")
        return value

    return Annotated[
        str,
        StringConstraints(min_length=1, max_length=URI_MAX),
        AfterValidator(check),
        Field(json_schema_extra={"pattern": pattern, "x-kubernetes-validations": [NO_PARENT_PATH]}),
    ]


ModelUri = _uri(MODEL_URI)
DataUri = _uri(DATA_URI)
StorageUri = _uri(STORAGE_URI)
