"""How the audit log of an API server is read: what the cluster's test compares with the chart's roles."""

import json

import helm_python
from tests.audit import granted, uses
from tests.e2e.test_rbac import ON_OTHER_CLUSTERS, USER
from tests.unit.chart.rendering import of_kind, render

LINES = [
    json.dumps({"user": {"username": user}, "verb": verb, "objectRef": about, "responseStatus": {"code": 200}})
    for user, verb, about in (
        (USER, "list", {"resource": "pods", "namespace": "n"}),
        (USER, "update", {"resource": "finetunejobs", "subresource": "status", "apiGroup": "finetune.dev", "namespace": "n"}),
        ("somebody", "delete", {"resource": "pods", "namespace": "n"}),
        ("somebody", "get", {"resource": "serviceaccounts", "name": USER}),
    )
]


def test_only_what_the_user_asked_for_is_counted() -> None:
    lines = [*LINES, LINES[0][:40], json.dumps({"user": {"username": USER}, "verb": "get", "requestURI": "/apis"})]
    assert [use for use, _ in uses(lines, USER)] == [("", "pods", "list"), ("finetune.dev", "finetunejobs/status", "update")]


def test_what_may_stay_unused_is_granted(chart: helm_python.Chart) -> None:
    allowed = granted(role for role in of_kind(render(chart, {"watchNamespaces": ["n"]}), "Role"))
    assert ON_OTHER_CLUSTERS.keys() <= allowed
    assert granted([json.loads('{"rules": [{"apiGroups": ["", "a"], "resources": ["r"], "verbs": ["get"]}]}')]) == {
        ("", "r", "get"),
        ("a", "r", "get"),
    }
