"""Random changes of good specs: the API server refuses what the models refuse, and takes what they take."""

import json
import math
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError
from tests.integration.crd_server import Server, server
from tests.unit.api.mutants import mutants

from finetune_api.v1alpha1 import parse_job

__all__ = ["server"]
pytestmark = [pytest.mark.api, pytest.mark.timeout(1800)]

NUMBER = int(os.environ.get("FINETUNE_MUTATIONS", "2000"))
SEARCHED = ("spec", "search", "parameters")
"""CEL does not see these values, which are of several types: the operator alone refuses one that its field does not take."""
LARGEST = 2**53
"""From here on JSON's numbers are not what was written, and each reader has its own way with them."""


@given(mutants(within=("spec",)))
@settings(
    max_examples=NUMBER,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_server_and_models_give_the_same_verdict_on_any_change(server: Server, manifest: dict[str, Any]) -> None:
    if not is_plain(manifest):
        return
    problems: list[tuple[int | str, ...]] = []
    try:
        parse_job(manifest)
    except ValidationError as error:
        problems = [each["loc"] for each in error.errors()]
    answer = server.verdict(json.dumps(manifest))
    accepted = answer.code == 201
    if accepted and all(place[:3] == SEARCHED for place in problems):
        return
    assert accepted == (not problems), f"{json.dumps(manifest)}\nserver: {answer.message}\nmodels: {problems}"


def is_plain(value: Any) -> bool:
    """Whether it is JSON that every reader understands alike: no half characters, no NUL, no number beyond exactness."""
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    if isinstance(value, str):
        return "\x00" not in value and not any("\ud800" <= each <= "\udfff" for each in value)
    if isinstance(value, int | float):
        return math.isfinite(float(value) if abs(value) < 1e300 else math.inf) and abs(value) < LARGEST
    return True
