"""The chart's alerts, by promtool: each fires where it should and keeps still where it should, and has a page of the runbook."""

from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from tests.promtool import promtool
from tests.unit.chart.rendering import EVERYTHING, ROOT, of_kind, one, render
from tests.unit.docs.markdown import anchors

CASES = sorted((ROOT / "tests/data/alerts").glob("*.yaml"))
RUNBOOK = ROOT / "docs/alerts.md"


def rules_of(chart: helm_python.Chart, values: dict[str, Any]) -> dict[str, Any]:
    return one(render(chart, values), "PrometheusRule")["spec"]


def alerts_in(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in spec["groups"] for rule in group["rules"]]


def test_rules_are_there_when_they_are_asked_for(chart: helm_python.Chart) -> None:
    assert of_kind(render(chart), "PrometheusRule") == []
    assert one(render(chart, EVERYTHING), "PrometheusRule")["metadata"]["labels"]["release"] == "prometheus"


def test_promtool_takes_the_rules(chart: helm_python.Chart, tmp_path: Path) -> None:
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules_of(chart, EVERYTHING)))
    assert "SUCCESS" in promtool("check", "rules", "--lint=all", "--lint-fatal", "alerts.yaml", folder=tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_alerts_fire_when_they_should(chart: helm_python.Chart, tmp_path: Path, case: Path) -> None:
    """promtool compares every annotation; the summaries are enough to show that the templates say what they should."""
    spec = rules_of(chart, EVERYTHING)
    for rule in alerts_in(spec):
        rule["annotations"] = {"summary": rule["annotations"]["summary"]}
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / case.name).write_text(case.read_text())
    assert "SUCCESS" in promtool("test", "rules", case.name, folder=tmp_path)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not(chart: helm_python.Chart) -> None:
    checks = [check for case in CASES for test in yaml.safe_load(case.read_text())["tests"] for check in test["alert_rule_test"]]
    names = {rule["alert"] for rule in alerts_in(rules_of(chart, EVERYTHING))}
    assert names == {check["alertname"] for check in checks if check["exp_alerts"]}
    assert names == {check["alertname"] for check in checks if not check["exp_alerts"]}


def test_every_alert_says_how_bad_it_is_and_where_to_read_on(chart: helm_python.Chart) -> None:
    rules = alerts_in(rules_of(chart, EVERYTHING))
    assert len(rules) > 10
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == "https://runbooks.example/finetune"
        assert anchor == rule["alert"].lower()
        assert anchor in anchors(RUNBOOK)
