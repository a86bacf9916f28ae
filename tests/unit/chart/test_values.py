"""The schema of the values: every value is known to it, and what makes no sense is refused."""

from typing import Any

import helm_python
import pytest
from tests.unit.chart.rendering import EVERYTHING


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("replicaCount", "2"),
        ("replicaCount", -1),
        ("image.tag", "with space"),
        ("image.digest", "sha256:abc"),
        ("image.pullPolicy", "Sometimes"),
        ("image.repository", ""),
        ("watchNamespaces", "team-a"),
        ("watchNamespaces", ["Team_A"]),
        ("watchNamespaces", ["team-a", "team-a"]),
        ("leaderElection", "yes"),
        ("trainer.graceSeconds", 30),
        ("trainer.head.memory", "4GB"),
        ("trainer.head.gpu", 1),
        ("operator.pollSeconds", 0),
        ("operator.maxConcurrent", 0),
        ("operator.logLevel", "verbose"),
        ("metrics.podMonitor.interval", "15"),
        ("metrics.prometheusRule.runbookUrl", "runbooks"),
        ("metrics.dashboards.namespace", "Grafana"),
        ("networkPolicy.metricsFrom", [{}]),
        ("networkPolicy.enabled", "true"),
        ("podDisruptionBudget.maxUnavailable", 0),
        ("podDisruptionBudget.maxUnavailable", "half"),
        ("tokenKey.value", "secret"),
        ("extraEnv", [{"name": "A B", "value": "x"}]),
        ("nodeSelector", {"zone": 1}),
        ("resources.limit", {}),
        ("replicas", 2),
    ],
)
def test_schema_refuses(chart: helm_python.Chart, path: str, value: object) -> None:
    *parents, last = path.split(".")
    values: dict[str, Any] = {}
    inner = values
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    with pytest.raises(helm_python.HelmValuesError, match=last):
        chart.validate_schema(values)


def test_schema_takes_the_defaults_and_everything(chart: helm_python.Chart) -> None:
    chart.validate_schema({})
    chart.validate_schema(EVERYTHING)


def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted paths of the values that are no maps, and of the maps that are empty."""
    found: set[str] = set()
    for key, value in values.items():
        path = f"{prefix}{key}"
        found |= leaves(value, path + ".") if isinstance(value, dict) and value else {path}
    return found


def schema_leaves(schema: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, inner in schema["properties"].items():
        found |= schema_leaves(inner, f"{prefix}{key}.") if "properties" in inner else {f"{prefix}{key}"}
    return found


def unrelated(paths: set[str], others: set[str]) -> set[str]:
    """The paths that are not among the others, nor above or below one of them: an empty default is above what the schema says of it."""
    return {path for path in paths if not any(f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.") for other in others)}


def objects_of(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, list):
        return [found for item in schema for found in objects_of(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" else []
    return own + [found for item in schema.values() for found in objects_of(item)]


def test_schema_covers_every_value_and_no_other(chart: helm_python.Chart) -> None:
    schema = chart.schema
    assert schema is not None
    described, written = schema_leaves(schema) - {"global"}, leaves(chart.values)  # global is Helm's own
    assert unrelated(described, written) == set()
    assert unrelated(written, described) == set()
    assert all(inner.get("additionalProperties") is False for inner in objects_of(schema))


def test_example_of_everything_leaves_nothing_out(chart: helm_python.Chart) -> None:
    assert chart.values.keys() - EVERYTHING.keys() == set()


def test_every_value_refuses_another_type(chart: helm_python.Chart) -> None:
    """A map where a number, a text or a list belongs, and a text where a map does."""
    taken = []
    for path in sorted(leaves(chart.values)):
        *parents, last = path.split(".")
        default: Any = chart.values
        for key in (*parents, last):
            default = default[key]
        wrong: dict[str, Any] = {last: "text" if isinstance(default, dict) else {"a": 1}}
        for parent in reversed(parents):
            wrong = {parent: wrong}
        try:
            chart.validate_schema(wrong)
        except helm_python.HelmValuesError:
            continue
        taken.append(path)
    assert taken == []


def test_values_of_a_wrong_type_are_not_rendered(chart: helm_python.Chart) -> None:
    with pytest.raises(helm_python.HelmError, match="replicaCount"):
        chart.render({"replicaCount": "two"}, name="a", namespace="b")
