"""Everything outside itself that a spec refers to: sources, ConfigMaps, Secrets and endpoints, wherever in the spec they stand."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from finetune_api.evaluation import HELD_OUT
from finetune_api.monitoring import measured_again
from finetune_api.objectives import Teacher
from finetune_api.sources import ConfigMapSource, Endpoint, ModelReference, ModelSource, Output, SecretReference
from finetune_api.v1alpha1 import Spec

Use = Literal["model", "data", "storage", "endpoint"]


@dataclass(frozen=True)
class Reference:
    """One place that a spec refers to."""

    field: str
    """The object in the spec that says so: spec.data.train, spec.evaluation.suites[0]."""
    use: Use
    """model: weights and tokenizer; data: rows or documents; storage: the job's own output; endpoint: a served model."""
    uri: str | None = None
    """Where it is; None for a ConfigMap."""
    config_map: ConfigMapSource | None = None
    secret: str | None = None
    """Name of the Secret that opens it."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    @property
    def claim(self) -> str | None:
        """The claim in pvc://claim/path."""
        uri = self.uri or ""
        return uri.removeprefix("pvc://").split("/", 1)[0] if uri.startswith("pvc://") else None


def references_of(spec: Spec) -> tuple[Reference, ...]:
    """All that the spec refers to, in the order of its fields. What is named twice stands twice."""
    return tuple(_inside(spec, "spec"))


def measuring_references(spec: Spec) -> tuple[Reference, ...]:
    """What a run of spec.monitoring refers to: fresh data, the model or its endpoint, and who else scores its suites' answers.

    Not what the job was trained on: that may be gone by then.
    """
    suites = measured_again(spec)
    scored = [f"spec.evaluation.suites[{place}]." for place, suite in enumerate(spec.evaluation.suites) if suite.name in suites]
    served = spec.monitoring is not None and spec.monitoring.endpoint is not None
    own = ("spec.output", "spec.monitoring.", *scored, *(() if served else ("spec.model",)))
    return tuple(reference for reference in references_of(spec) if reference.field.startswith(own))


def _inside(value: object, field: str) -> Iterator[Reference]:
    if isinstance(value, BaseModel):
        if reference := _reference(value, field):
            yield reference
        for name, written in _fields(type(value)):
            inner = getattr(value, name)
            if isinstance(inner, (BaseModel, tuple)):
                yield from _inside(inner, f"{field}.{written}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _inside(item, f"{field}[{index}]")


@functools.cache
def _fields(kind: type[BaseModel]) -> tuple[tuple[str, str], ...]:
    """Fields of a model, each by its own name and as it is written."""
    return tuple((name, info.alias or name) for name, info in kind.model_fields.items())


@functools.cache
def _has(kind: type[BaseModel], name: str) -> bool:
    """Whether objects of a model have such an attribute. pydantic takes long to say of an object that it has not."""
    return name in kind.model_fields or hasattr(kind, name)


def _get(model: BaseModel, name: str) -> Any:  # noqa: ANN401 - of whatever type the field is
    return getattr(model, name) if _has(type(model), name) else None


def _reference(model: BaseModel, field: str) -> Reference | None:
    """What an object itself refers to; the objects inside it are asked apart."""
    secret: SecretReference | None = _get(model, "secret_ref")
    name = secret.name if secret else None
    if isinstance(model, Endpoint):
        return Reference(field, "endpoint", model.url, secret=name)
    if isinstance(model, Output):
        return Reference(field, "storage", model.storage, secret=name)
    uri: str | None = _get(model, "source")
    config_map: ConfigMapSource | None = _get(model, "config_map")
    if (uri is None or uri in HELD_OUT) and config_map is None:
        return None
    use: Use = "model" if isinstance(model, (ModelSource, ModelReference, Teacher)) else "data"
    return Reference(field, use, uri, config_map, name, _get(model, "revision"))
