"""The chart's dashboards and alerts on a real Prometheus server that scrapes the operator's and a head's exposition."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
from tests.integration.trainer.harness import free_ports
from tests.prometheus_server import Prometheus, prometheus, targets
from tests.unit.chart.rendering import CHART, EVERYTHING, of_kind, one, render
from tests.unit.operator_edges.test_metrics import EVALUATED, JOB, MONITORED, ending
from tests.unit.trainer_run.test_pace import full_exposition

from finetune_operator.metrics import Metrics
from finetune_operator.port import ApiError

HEAD = {"namespace": "team", "name": "bot", "pod": "bot-1-head"}
"""The labels that the PodMonitor gives the series of a head."""
VARIABLES = {"$namespace": "team", "$name": "bot", "$__rate_interval": "30s"}


def operator_exposition() -> bytes:
    """An operator that has done and seen everything that there is a series for."""
    metrics = Metrics("1.2.3", depth=lambda: 5, leading=lambda: True)
    metrics.api_request("list", 200, 0.02)
    metrics.watched("finetunejobs")
    for error in None, ApiError(503, "", ""):
        with contextlib.suppress(ApiError), metrics.reconcile():
            if error:
                raise error
    for uid, end in ("u-8", ending("Complete", "Succeeded")), ("u-9", ending("Failed", "OOMKilled")):
        meta = {**JOB["metadata"], "uid": uid, "name": uid}
        metrics.jobs.see({**JOB, "metadata": meta, "status": {"phase": "Training"}}, gone=False)
        metrics.jobs.see({**end, "metadata": meta}, gone=False)
    going_on = [each for each in JOB["status"]["conditions"] if each["type"] != "Failed"]
    status = {**JOB["status"], **EVALUATED, "phase": "Training", "conditions": going_on}
    metrics.jobs.see({**JOB, "status": status}, gone=False)
    released = {**JOB["metadata"], "uid": "u-7", "name": "released"}
    metrics.jobs.see({**JOB, "metadata": released, "status": {"phase": "Complete", **MONITORED}}, gone=False)
    return metrics.render()


@pytest.fixture(scope="module")
def chart_objects() -> list[dict[str, Any]]:
    with helm_python.Chart.load(CHART) as chart:
        return render(chart, EVERYTHING)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, chart_objects: list[dict[str, Any]]) -> Iterator[Prometheus]:
    (port,) = free_ports(1)
    with targets({"/operator": operator_exposition(), "/head": full_exposition()}) as address:
        jobs = [
            {"job_name": "operator", "honor_labels": True, "metrics_path": "/operator", "static_configs": [{"targets": [address]}]},
            {"job_name": "head", "metrics_path": "/head", "static_configs": [{"targets": [address], "labels": HEAD}]},
        ]
        rules = one(chart_objects, "PrometheusRule")["spec"]
        with prometheus(tmp_path_factory.mktemp("prometheus"), port, rules, jobs) as running:
            yield running


def dashboards(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The dashboards by file name."""
    maps = [item for item in of_kind(objects, "ConfigMap") if item["metadata"]["labels"].get("grafana_dashboard") == "1"]
    return {name: json.loads(text) for item in maps for name, text in item["data"].items()}


def expressions(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """Title of the panel and what it asks for, variables filled in."""
    found = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [(title, filled(expression)) for title, expression in found]


def filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def test_every_panel_shows_something(server: Prometheus, chart_objects: list[dict[str, Any]]) -> None:
    found = dashboards(chart_objects)
    assert found.keys() == {"finetune-platform.json", "finetune-job.json"}
    for dashboard in found.values():
        assert len(expressions(dashboard)) > 20
        for title, expression in expressions(dashboard):
            of_another_job = expression.replace('"bot"', '"released"')
            assert server.query(expression) or server.query(of_another_job), f"{dashboard['title']}, {title}: nothing comes of {expression}"


def test_every_metric_of_a_panel_exists(server: Prometheus, chart_objects: list[dict[str, Any]]) -> None:
    known = set(server.get("label/__name__/values"))
    asked = {
        name for each in dashboards(chart_objects).values() for _, text in expressions(each) for name in re.findall(r"\bfinetune_\w+", text)
    }
    assert len(asked) > 40
    assert asked <= known


def test_every_metric_of_a_rule_exists(server: Prometheus, chart_objects: list[dict[str, Any]]) -> None:
    known = set(server.get("label/__name__/values"))
    rules = one(chart_objects, "PrometheusRule")["spec"]["groups"]
    assert {name for group in rules for rule in group["rules"] for name in re.findall(r"\bfinetune_\w+", rule["expr"])} <= known


def test_the_variables_of_the_dashboards_have_values(server: Prometheus, chart_objects: list[dict[str, Any]]) -> None:
    for dashboard in dashboards(chart_objects).values():
        queries = [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
        assert queries
        for query in queries:
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()  # type: ignore[union-attr]
            assert VARIABLES[f"${label}"] in server.get(f"label/{label}/values", **{"match[]": filled(selector)})


def test_rules_are_evaluated_without_an_error(server: Prometheus) -> None:
    rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 10
    assert {(rule["name"], rule["health"], rule.get("lastError", "")) for rule in rules} == {(rule["name"], "ok", "") for rule in rules}


def test_dashboards_are_objects_that_grafana_can_tell_apart(chart_objects: list[dict[str, Any]]) -> None:
    found = list(dashboards(chart_objects).values())
    assert len({each["uid"] for each in found}) == len({each["title"] for each in found}) == 2
    for dashboard in found:
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
        places = [panel["gridPos"] for panel in dashboard["panels"]]
        cells = [(x, y) for g in places for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])]
        assert len(cells) == len(set(cells)), "panels lie on one another"
        assert max(x for x, _ in cells) < 24
