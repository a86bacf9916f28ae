"""JSON as the API server reads and stores it, before it is judged."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from finetune_api.fields import model_in


@cache
def _parts(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """The fields of a model by their names in JSON, each with the model inside it. The operator asks at every look at every job."""
    return {field.alias or name: model_in(field.annotation) for name, field in model.model_fields.items()}


def as_stored(value: Any, model: type[BaseModel] | None) -> Any:  # noqa: ANN401 - JSON
    """The value as the API server reads it: a known field that is null is absent, and 3.0 is the integer 3."""
    if isinstance(value, Mapping):
        fields = _parts(model) if model else None
        return {
            key: as_stored(item, fields.get(key) if fields else None)
            for key, item in value.items()
            if item is not None or (fields and key not in fields)
        }
    if isinstance(value, (list, tuple)):
        return [as_stored(item, model) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return value
