"""Base models and bounded field types. Every string, list and map is bounded, so that CEL's cost stays within the API server's limit."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Protocol, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    WrapValidator,
)
from pydantic.alias_generators import to_camel

LOCAL_RUN = {"local": True}
"""Validation context of a run without Kubernetes, where `file://` sources are allowed."""


class SpecModel(BaseModel):
    """A part of a spec: frozen, typed strictly, unknown fields refused."""

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


class StatusModel(BaseModel):
    """A part of a status or a report: frozen; unknown fields are ignored, since operator and trainer may differ in version."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
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
    return rule(f"{count} == 1", _exactly_one_message(names))


def check_exactly_one(model: BaseModel, *names: str) -> None:
    """The same rule in Python. Raises ValueError."""
    fields = {field.alias or name: name for name, field in type(model).model_fields.items()}
    if sum(getattr(model, fields[name]) is not None for name in names) != 1:
        raise ValueError(_exactly_one_message(names))


def _exactly_one_message(names: tuple[str, ...]) -> str:
    return f"exactly one of {', '.join(names)} must be set" if len(names) > 1 else f"{names[0]} must be set"


def check(holds: bool, message: str) -> None:
    """A rule in Python. Raises ValueError."""
    if not holds:
        raise ValueError(message)


def check_distinct(items: tuple[str, ...]) -> tuple[str, ...]:
    """The items of a list of type `set`, where each stands once. Raises ValueError."""
    check(len(set(items)) == len(items), "every name must stand once")
    return items


class Named(Protocol):
    """What has a name."""

    @property
    def name(self) -> str:
        """The name."""


_Named = TypeVar("_Named", bound=Named)


def check_names_distinct(items: tuple[_Named, ...]) -> tuple[_Named, ...]:
    """The items of a list of type `map`, where each name stands once. Raises ValueError."""
    check(len({item.name for item in items}) == len(items), "every name must stand once")
    return items


BY_NAME: dict[str, Any] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
"""The `json_schema_extra` of a list whose items have a name each."""


def model_in(annotation: object) -> type[BaseModel] | None:
    """The model inside an annotation such as `Model | None` or `tuple[Model, ...]`; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for argument in get_args(annotation) if (model := model_in(argument))), None)


def is_local(info: ValidationInfo) -> bool:
    """Whether the validation is for a run on this machine, without Kubernetes."""
    return bool(info.context and info.context.get("local"))


def described(what: str) -> WrapValidator:
    """Says what a value must be in words, where its bounds and patterns would say it in signs."""

    def validate(value: object, check_value: Callable[[object], object]) -> object:
        try:
            return check_value(value)
        except ValidationError:
            raise ValueError(f"must be {what}") from None

    return WrapValidator(validate)


def _text(pattern: str, most: int, what: str, least: int = 1) -> Any:  # noqa: ANN401 - an annotation
    """A string of a pattern and a length."""
    return Annotated[
        str, StringConstraints(min_length=least, max_length=most, pattern=pattern), described(f"{what}, at most {most} characters")
    ]


_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_WORD = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LABEL_PATTERN = f"^{_LABEL}$"
"""A DNS label (RFC 1123)."""
JOB_NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""A DNS label that begins with a letter (RFC 1035): an attempt's Service is named after its job."""
RESOURCE_PATTERN = rf"^(cpu|memory|ephemeral-storage|hugepages-[0-9]+[KMGT]i|{_SUBDOMAIN}/{_WORD})$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"

ObjectName = _text(rf"^{_SUBDOMAIN}$", 253, "the name of a Kubernetes object (lower-case letters, digits, inner hyphens and dots)")
ProfileName = _text(LABEL_PATTERN, 63, "a profile's name (lower-case letters, digits and inner hyphens)")
QueueName = _text(rf"^{_SUBDOMAIN}$", 63, "the name of a queue (lower-case letters, digits, inner hyphens and dots)")
ConfigMapKey = _text(r"^[-_a-zA-Z0-9][-._a-zA-Z0-9]*$", 253, "a ConfigMap's key (letters, digits, -, _ and .)")
Revision = _text(r"^[A-Za-z0-9_][A-Za-z0-9_-]*([./][A-Za-z0-9_-]+)*$", 128, "a branch, tag or commit (quote one that reads as a number)")
ColumnName = _text(r"^[^\x00-\x1f]+$", 128, "a column's name, without control characters")
ModulePattern = _text(r"^[A-Za-z0-9_.*-]+$", 128, "a module's name (letters, digits, _, ., - and *)")
SplitName = _text(r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", 128, "a split's name (letters, digits, _ and inner dots)")
SubsetName = _text(
    r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$", 128, "a subset's name (letters, digits, _, ., + and -; quote one that reads as a number)"
)
ServedModel = _text(r"^[^\x00-\x1f]+$", 253, "a model's name, without control characters")
ShortName = _text(LABEL_PATTERN, 32, "a short name (lower-case letters, digits and inner hyphens)")
METRIC_PATTERN = rf"^{_LABEL}/[A-Za-z0-9_.-]+$"
MetricName = _text(METRIC_PATTERN, 97, "a metric's name: suite/metric, such as task/exactMatch")
Template = Annotated[str, Field(min_length=1, max_length=8192)]
"""Words for a model, in which some {words} stand for what is put there."""
LabelKey = _text(rf"^({_SUBDOMAIN}/)?{_WORD}$", 317, "a label's key: name, or domain/name with a name of at most 63 characters")
LabelValue = _text(rf"^({_WORD})?$", 63, "a label's value (a string of letters, digits, inner -, _ and .)", least=0)
ResourceName = _text(RESOURCE_PATTERN, 317, "cpu, memory, ephemeral-storage, hugepages-SIZE or a device such as nvidia.com/gpu")
Quantity = Annotated[
    Annotated[int, Field(ge=0, le=2**53)] | Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=QUANTITY_PATTERN)],
    described("a quantity: a whole number, or a string such as 500m, '1.5' or 64Gi"),
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]

# A folder or file name that is not `.` or `..`; any number of them after a root.
_SEGMENT = r"\.?[A-Za-z0-9_=+@-][A-Za-z0-9_.=+@-]*"
PATH = rf"(/{_SEGMENT})*/?"
_HUB_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*"
_S3 = rf"s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9]{PATH}"
_PVC = rf"pvc://{_SUBDOMAIN}{PATH}"
MODEL_URI = rf"^(hf://{_HUB_NAME}|{_S3}|{_PVC})$"
_DATA = rf"hf://datasets/{_HUB_NAME}{PATH}|{_S3}|{_PVC}"
DATA_URI = rf"^({_DATA})$"
SUITE_SOURCE = rf"^(test|validation|{_DATA})$"
STORAGE_URI = rf"^({_S3}|{_PVC})$"
FILE_URI = r"^file://[^\x00-\x1f:]+$"
_HOST_LABEL = "[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?"
ENDPOINT_URL = rf"^https?://{_HOST_LABEL}(\.{_HOST_LABEL})*(:[0-9]{{1,5}})?{PATH}$"
URI_MAX = 1024

NO_PARENT_PATH = rule("!self.contains('..')", "a URI must not contain '..'")


def _uri(pattern: str, forms: str) -> Any:  # noqa: ANN401 - an annotation
    """A bounded URI of the given form; `file://` only where the validation context says that the run is local."""

    def checked(value: str, info: ValidationInfo) -> str:
        if ".." in value:
            raise ValueError("a URI must not contain '..'")
        if is_local(info) and re.fullmatch(FILE_URI, value):
            return value
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {forms}{' or file://path' if is_local(info) else ''}")
        return value

    validations: list[JsonValue] = [dict(NO_PARENT_PATH)]
    return Annotated[
        str,
        StringConstraints(min_length=1, max_length=URI_MAX),
        AfterValidator(checked),
        Field(json_schema_extra={"pattern": pattern, "x-kubernetes-validations": validations}),
    ]


ModelUri = _uri(MODEL_URI, "hf://owner/name, s3://bucket/path or pvc://claim/path")
DataUri = _uri(DATA_URI, "hf://datasets/owner/name/path, s3://bucket/path or pvc://claim/path")
SuiteSource = _uri(SUITE_SOURCE, "test, validation, hf://datasets/owner/name/path, s3://bucket/path or pvc://claim/path")
StorageUri = _uri(STORAGE_URI, "s3://bucket/path or pvc://claim/path")
EndpointUrl = _text(ENDPOINT_URL, URI_MAX, "http://host/path or https://host/path, without credentials, query or fragment")
