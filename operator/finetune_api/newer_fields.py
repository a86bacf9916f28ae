"""A job's spec as an operator writes it for a trainer image of before: what that image does not know and nobody has chosen is left out.

A job keeps the image that it began with over upgrades of the operator, and a profile may name an older one. The newer API fills in defaults
of fields that such an image has never heard of; it does without them, as it did before. A field that has another value is not left out: the
image cannot do what is asked of it, and says so.
"""

from collections.abc import Iterable, Mapping
from typing import Any

Shape = Any
"""The fields of a JSON value without their values: a map of maps, a list of shapes, else None."""
Location = tuple[str | int, ...]
"""Where something stands, as pydantic says it: names, numbers of items, and words about unions, which are no part of the way."""


def shape_of(value: object) -> Shape:
    """The shape of a JSON value."""
    if isinstance(value, Mapping):
        return {key: shape_of(inner) for key, inner in value.items()}
    return [shape_of(inner) for inner in value] if isinstance(value, list) else None


def without_unknown(spec: Any, unknown: Iterable[Location], chosen: Shape) -> Any:  # noqa: ANN401 - JSON
    """The spec without the fields at these locations, but for those that stand in `chosen`, too."""
    for location in unknown:
        spec = _without(spec, location, chosen)
    return spec


def _without(value: Any, location: Location, chosen: Shape) -> Any:  # noqa: ANN401 - JSON
    name, *rest = location
    if isinstance(value, Mapping) and name in value:
        known = chosen[name] if isinstance(chosen, Mapping) and name in chosen else _ABSENT
        if not rest:
            return value if known is not _ABSENT else {key: inner for key, inner in value.items() if key != name}
        return {**value, name: _without(value[name], tuple(rest), known)}
    if isinstance(value, list) and isinstance(name, int) and rest and name < len(value):
        known = chosen[name] if isinstance(chosen, list) and name < len(chosen) else _ABSENT
        return [_without(inner, tuple(rest), known) if index == name else inner for index, inner in enumerate(value)]
    return _without(value, tuple(rest), chosen) if rest else value


_ABSENT = object()
