"""Bounded field types of statuses and reports: an API server refuses the whole status for one value that is out of bounds."""

import re
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, Field, StrictBool, StrictFloat, StrictInt, StrictStr, WithJsonSchema

TEXT_MAX = 1024
"""Longest text for people, in characters."""
COUNT_MAX = 2**53 - 1

Text = Annotated[str, Field(max_length=TEXT_MAX)]
Name = Annotated[str, Field(max_length=253)]
Uri = Annotated[str, Field(max_length=2048)]
MeasureName = Annotated[str, Field(max_length=128)]
"""Name of a measure as suite/measure: train/loss, task/exactMatch."""


def _time(value: str) -> str:
    """The API server checks the form, and would refuse the whole status for one wrong time in a trainer's report."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:[0-5]\d)", value):
        raise ValueError("a time must be as in 2026-01-31T12:00:00Z")
    datetime.fromisoformat(value)
    return value


def _count(value: int) -> int:
    """The API server knows 64 bits, but JSON in most languages only 53."""
    if value > COUNT_MAX:
        raise ValueError("a count must be smaller than 2**53")
    return value


Time = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"}), AfterValidator(_time)]
Count = Annotated[int, Field(ge=0), AfterValidator(_count)]
_Whole = Annotated[StrictInt, Field(ge=-COUNT_MAX, le=COUNT_MAX)]
"""The API server reads longer ones as floats, and refuses the whole status for one that is beyond those."""
Scalar = StrictBool | _Whole | StrictFloat | Annotated[StrictStr, Field(max_length=64)]
"""A value of a field that a search tries."""
AnyScalar = Annotated[Scalar, WithJsonSchema({"x-kubernetes-preserve-unknown-fields": True})]
