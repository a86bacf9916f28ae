"""Schedules as cron has them, in five fields of numbers: minute, hour, day of the month, month, day of the week; in UTC.

Names (MON, JAN), seconds and words (@daily) are not taken, so that one pattern says all that may stand there, to `kubectl apply` too.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, JsonValue, StringConstraints

from finetune_api.fields import check, rule

SCHEDULE_MAX = 64


def _field(number: str) -> str:
    item = rf"(\*|{number}(-{number})?)(/[1-9][0-9]?)?"
    return f"{item}(,{item})*"


_NUMBERS = ("[0-5]?[0-9]", "([01]?[0-9]|2[0-3])", "(0?[1-9]|[12][0-9]|3[01])", "(0?[1-9]|1[0-2])", "[0-7]")
"""Of minute, hour, day of the month, month and day of the week; Sunday is 0 and 7."""
PATTERN = f"^{' '.join(map(_field, _NUMBERS))}$"
_NEVER = r"^[^ ]+ [^ ]+ ((30|31|30-31)(,(30|31|30-31))* 0?2|31(,31)* (0?[2469]|11)(,(0?[2469]|11))*) [*]"
"""The 30th of February, and the 31st of a month of thirty days: schedules that never come, in the ways that they are written."""
_FORWARDS = rule(
    "self.replace(' ', ',').split(',').all(item, !item.contains('-') || "
    "int(item.split('/')[0].split('-')[0]) <= int(item.split('/')[0].split('-')[1]))",
    "a range must begin with the smaller number: 1-5",
)
_COMES = rule(f"!self.matches('{_NEVER}')", "no month that is named has such a day")
_FORM = "five fields of numbers as cron has them (minute, hour, day, month, day of the week; * , - and /), such as '0 3 * * 1-5'"


def _checked(value: str) -> str:
    check(re.fullmatch(PATTERN.removeprefix("^").removesuffix("$"), value) is not None, f"must be {_FORM}")
    ranges = (item.split("/")[0].split("-") for item in value.replace(" ", ",").split(",") if "-" in item)
    check(all(int(first) <= int(last) for first, last in ranges), _FORWARDS["message"])
    check(re.match(_NEVER, value) is None, _COMES["message"])
    return value


_VALIDATIONS: list[JsonValue] = [dict(_FORWARDS), dict(_COMES)]
Schedule = Annotated[
    str,
    StringConstraints(min_length=1, max_length=SCHEDULE_MAX),
    AfterValidator(_checked),
    Field(json_schema_extra={"pattern": PATTERN, "x-kubernetes-validations": _VALIDATIONS}),
]
