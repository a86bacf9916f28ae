"""Every object of the chart, offered to a real API server: for the default values, and with everything on.

Nothing is stored but service accounts.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

import helm_python
import pytest
import pytest_asyncio
import yaml
from tests.integration.api.apiserver import ApiServer
from tests.integration.api.kube import AnswerError, Kube, Object
from tests.unit.chart.rendering import CHART, EVERYTHING, HOOK

pytestmark = pytest.mark.api

MONITORING = {"ServiceMonitor": "servicemonitors", "PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"}
RELEASE = "on-trial"
PLURALS = {"NetworkPolicy": "networkpolicies", "ValidatingAdmissionPolicy": "validatingadmissionpolicies", **MONITORING}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def monitoring(kube: Kube) -> AsyncIterator[None]:
    """The kinds of the Prometheus operator, whose fields nobody checks here."""
    made = [kind for kind, plural in MONITORING.items() if await _make(kube, _open_kind(kind, plural))]
    async with asyncio.timeout(60):
        while set(MONITORING) - await _served(kube, "monitoring.coreos.com/v1"):
            await asyncio.sleep(0.5)
    yield
    for kind in made:
        await kube.delete("CustomResourceDefinition", "", f"{MONITORING[kind]}.monitoring.coreos.com")


async def _served(kube: Kube, group: str) -> set[str]:
    try:
        return {each["kind"] for each in (await kube.call("GET", f"/apis/{group}"))["resources"]}
    except (AnswerError, ValueError):
        return set()


@pytest_asyncio.fixture(loop_scope="session")
async def namespaces(kube: Kube) -> AsyncIterator[list[str]]:
    """Namespaces that the chart puts objects into."""
    names = [f"chart-{secrets.token_hex(3)}-{part}" for part in ("system", "a", "b", "grafana")]
    for name in names:
        await kube.create("Namespace", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield names
    for name in names:
        await kube.delete("Namespace", "", name)


async def _make(kube: Kube, crd: Object) -> bool:
    """Whether it was not there before."""
    try:
        await kube.create("CustomResourceDefinition", crd)
    except AnswerError as error:
        if error.status != 409:
            raise
        return False
    return True


def _open_kind(kind: str, plural: str) -> Object:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com",
            "scope": "Namespaced",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
        },
    }


def values_for(case: str, names: list[str]) -> tuple[dict[str, Any], str]:
    """The values of a case, in namespaces of the test's own; and the release's."""
    system, a, b, grafana = names
    if case == "defaults":
        return {}, system
    dashboards = {**EVERYTHING["metrics"]["dashboards"], "namespace": grafana}
    return {**EVERYTHING, "watchNamespaces": [a, b], "metrics": {**EVERYTHING["metrics"], "dashboards": dashboards}}, system


def rendered(server: ApiServer, values: dict[str, Any], namespace: str) -> list[dict[str, Any]]:
    """The objects as Helm renders them for this very server, hooks included. The CRD has tests of its own."""
    values = {**values, "crds": {"enabled": False, "keep": False}}
    with helm_python.Config(kubeconfig_path=server.admin_kubeconfig, namespace=namespace) as helm:
        release = helm.install(str(CHART), RELEASE, values, dry_run="server")
    with helm_python.Chart.load(CHART) as chart:
        every = [item for text in chart.render(values, name=RELEASE, namespace=namespace).values() for item in _objects(text)]
    hooks = [item for item in every if HOOK in item["metadata"].get("annotations", {})]
    return [*_objects(release["manifest"]), *hooks]


def _objects(text: str) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all(text) if isinstance(item, dict)] if "apiVersion:" in text else []


def path_of(item: dict[str, Any]) -> str:
    api, kind, namespace = item["apiVersion"], item["kind"], item["metadata"].get("namespace")
    root = f"/apis/{api}" if "/" in api else f"/api/{api}"
    return f"{root}{f'/namespaces/{namespace}' if namespace else ''}/{PLURALS.get(kind, kind.lower() + 's')}"


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.usefixtures("monitoring")
@pytest.mark.parametrize("case", ["defaults", "everything"])
async def test_api_server_takes_every_object(server: ApiServer, kube: Kube, namespaces: list[str], case: str) -> None:
    values, system = values_for(case, namespaces)
    if "ValidatingAdmissionPolicy" not in await _served(kube, "admissionregistration.k8s.io/v1"):
        values = {**values, "admissionPolicy": {"enabled": False}}  # before Kubernetes 1.30
    objects = await asyncio.to_thread(rendered, server, values, system)
    assert {item["kind"] for item in objects} >= {"Deployment", "Service", "Pod", "NetworkPolicy", "Role"}
    assert (case == "everything") == any(item["kind"] == "PrometheusRule" for item in objects)
    refused = []
    for item in sorted(objects, key=lambda item: item["kind"] != "ServiceAccount"):
        # Pods are refused where their account is not there. It goes with the test's namespace.
        trial = "" if item["kind"] == "ServiceAccount" else "?dryRun=All"
        if item["kind"] == "Pod":  # an API server alone has nobody who makes an account's token
            item["spec"]["automountServiceAccountToken"] = False
        try:
            stored = await kube.call("POST", path_of(item) + trial, item)
        except AnswerError as error:
            refused.append(f"{item['kind']} {item['metadata']['name']}: {error}")
            continue
        assert _lost(item, stored) == [], f"the API server does not know these fields of {item['kind']}"
    assert refused == []


def _lost(given: Any, stored: Any, path: str = "") -> list[str]:
    """Fields that were offered and are not in what the server would store: it leaves out what it does not know, without a word."""
    if isinstance(given, dict):
        if not isinstance(stored, dict):
            return [path]
        known = {key: value for key, value in given.items() if value not in (None, {}, [], "")}
        return [
            lost
            for key, value in known.items()
            for lost in (_lost(value, stored[key], f"{path}.{key}") if key in stored else [f"{path}.{key}"])
        ]
    if isinstance(given, list):
        pairs = zip(given, stored, strict=False) if isinstance(stored, list) and len(given) <= len(stored) else [(given, None)]
        return [lost for one, other in pairs for lost in _lost(one, other, f"{path}[]")] if given != stored else []
    return []


def test_loss_of_a_field_is_noticed() -> None:
    given = {"spec": {"a": 1, "list": [{"b": 1, "c": 2}], "empty": {}}}
    assert _lost(given, json.loads(json.dumps(given))) == []
    assert _lost(given, {"spec": {"a": 1, "list": [{"b": 1}]}}) == [".spec.list[].c"]
    assert _lost(given, {"spec": {"list": [{"b": 1, "c": 2}]}}) == [".spec.a"]
