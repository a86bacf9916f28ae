"""Everything outside itself that a spec refers to: sources, ConfigMaps, Secrets and endpoints, wherever in the spec they stand."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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
        for name, info in type(value).model_fields.items():
            yield from _inside(getattr(value, name), f"{field}.{info.alias or name}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _inside(item, f"{field}[{index}]")


def _reference(model: BaseModel, field: str) -> Reference | None:
    """What an object itself refers to; the objects inside it are asked apart."""
    secret: SecretReference | None = getattr(model, "secret_ref", None)
    name = secret.name if secret else None
    if isinstance(model, Endpoint):
        return Reference(field, "endpoint", model.url, secret=name)
    if isinstance(model, Output):
        return Reference(field, "storage", model.storage, secret=name)
    uri: str | None = getattr(model, "source", None)
    config_map: ConfigMapSource | None = getattr(model, "config_map", None)
    if (uri is None or uri in HELD_OUT) and config_map is None:
        return None
    use: Use = "model" if isinstance(model, (ModelSource, ModelReference, Teacher)) else "data"
    return Reference(field, use, uri, config_map, name, getattr(model, "revision", None))
