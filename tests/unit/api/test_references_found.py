"""Every field of a job that holds a URI is found by the walk over the spec, so that a new one cannot be forgotten by an allow-list."""

from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from finetune_api.fields import DATA_URI, ENDPOINT_URL, MODEL_URI, STORAGE_URI, SUITE_SOURCE
from finetune_api.references import references_of
from finetune_api.v1alpha1 import Spec

URIS = {
    MODEL_URI: "hf://org/model",
    DATA_URI: "pvc://claim/data",
    SUITE_SOURCE: "pvc://claim/suite",
    STORAGE_URI: "pvc://claim/out",
    ENDPOINT_URL: "https://models.example.com/v1",
}


def patterns_in(value: object) -> set[str]:
    """The patterns that stand anywhere in an annotation or in what is put beside it."""
    found = {value} if isinstance(value, str) else set()
    extra = getattr(value, "json_schema_extra", None)
    if isinstance(extra, dict) and isinstance(extra.get("pattern"), str):
        found.add(extra["pattern"])
    if isinstance(getattr(value, "pattern", None), str):
        found.add(value.pattern)
    for inner in (*get_args(value), *getattr(value, "__metadata__", ()), *getattr(value, "metadata", ())):
        found |= patterns_in(inner)
    return found


def models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def is_list(annotation: object) -> bool:
    return "tuple" in str(annotation) and bool(models_in(annotation))


def filled(model: type[BaseModel], path: str, places: dict[str, str]) -> BaseModel:
    """A model with everything in it that may be in it, unchecked, and each URI in its place."""
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        at = f"{path}.{field.alias or name}"
        uri = next((URIS[pattern] for pattern in patterns_in(field.annotation) | patterns_in(field) if pattern in URIS), None)
        inner = models_in(field.annotation)
        if uri is not None:
            values[name] = f"{uri}-{len(places)}"
            places[at] = values[name]
        elif inner and is_list(field.annotation):
            values[name] = (filled(inner[0], f"{at}[0]", places),)
        elif inner and "dict" not in str(field.annotation):
            values[name] = filled(inner[0], at, places)
        else:
            values[name] = None if field.default is PydanticUndefined else field.default
    return model.model_construct(**values)


def test_every_uri_of_a_spec_is_found():
    places: dict[str, str] = {}
    spec = filled(Spec, "spec", places)
    assert isinstance(spec, Spec)
    assert {reference.uri for reference in references_of(spec) if reference.uri} == set(places.values())
    # The search itself found what is known to be there, however deep.
    assert {
        "spec.model.source",
        "spec.data.train.source",
        "spec.objective.distillation.teacher.source",
        "spec.objective.distillation.teacher.endpoint.url",
        "spec.data.preparation.contentPoints.knowledgeBase.source",
        "spec.data.preparation.contentPoints.retriever.encoder.source",
        "spec.data.preparation.contentPoints.generator.endpoint.url",
        "spec.evaluation.suites[0].source",
        "spec.evaluation.suites[0].encoder.source",
        "spec.evaluation.suites[0].judge.endpoint.url",
        "spec.monitoring.suites[0].source",
        "spec.monitoring.endpoint.url",
        "spec.baseline.models[0].source",
        "spec.output.storage",
    } <= set(places)
    assert len(places) >= 18
