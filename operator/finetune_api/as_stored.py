"""JSON as the API server reads and stores it, before it is judged."""

from collections.abc import Mapping
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from finetune_api.fields import model_in


@cache
def _parts(model: type[BaseModel]) -> dict[str, tuple[type[BaseModel] | None, bool]]:
    """The fields of a model by their names in JSON: the model inside each, and whether it stands below the keys of a map.

    The operator asks at every look at every job.
    """
    return {field.alias or name: (model_in(field.annotation), _is_map(field.annotation)) for name, field in model.model_fields.items()}


def _is_map(annotation: object) -> bool:
    """Whether an annotation is a map with keys of the user's, or may be."""
    return get_origin(annotation) is dict or any(_is_map(argument) for argument in get_args(annotation))


def as_stored(value: Any, model: type[BaseModel] | None, *, is_map: bool = False) -> Any:  # noqa: ANN401 - JSON
    """The value as the API server reads it: a known field or a map's key that is null is absent, and 3.0 is the integer 3.

    `model` is that of the value, or with `is_map` that of the map's values; None where there is none.
    """
    if isinstance(value, Mapping):
        if model is None or is_map:
            return {key: as_stored(item, model) for key, item in value.items() if item is not None}
        fields = _parts(model)
        return {key: _field(item, fields.get(key)) for key, item in value.items() if item is not None or key not in fields}
    if isinstance(value, (list, tuple)):
        return [as_stored(item, model) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return value


def _field(value: Any, part: tuple[type[BaseModel] | None, bool] | None) -> Any:  # noqa: ANN401 - JSON
    model, is_map = part or (None, False)
    return as_stored(value, model, is_map=is_map)
