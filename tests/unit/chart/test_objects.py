"""The chart as Helm 4 reads it: it lints, and renders the objects that it should."""

import re
from typing import Any

import helm_python
import pytest
import yaml
from tests.unit.chart.rendering import CHART, EVERYTHING, RELEASE, ROOT, of_kind, one, render, render_test

from finetune_api import LABEL_JOB_NAME
from finetune_api.status import Attempt, Status
from finetune_operator.observed import job_from
from finetune_operator.plan import desired_objects
from finetune_operator.settings import Settings


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
@pytest.mark.parametrize("kube_version", ["v1.20.2", "v1.36.0"])
def test_lints_without_a_warning(values: dict[str, Any], kube_version: str) -> None:
    report = helm_python.lint(CHART, values, strict=True, kube_version=kube_version, namespace="finetune-system")
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_renders_these_objects_by_default(chart: helm_python.Chart) -> None:
    assert sorted((item["kind"], item["metadata"]["name"]) for item in render(chart)) == [
        ("ClusterRole", "finetune-operator"),
        ("ClusterRole", "finetune-operator-editor"),
        ("ClusterRole", "finetune-operator-profiles"),
        ("ClusterRole", "finetune-operator-viewer"),
        ("ClusterRoleBinding", "finetune-operator"),
        ("ClusterRoleBinding", "finetune-operator-profiles"),
        ("CustomResourceDefinition", "finetunejobs.finetune.dev"),
        ("CustomResourceDefinition", "tuningprofiles.finetune.dev"),
        ("Deployment", "finetune-operator"),
        ("NetworkPolicy", "finetune-operator"),
        ("Role", "finetune-operator-leader"),
        ("RoleBinding", "finetune-operator-leader"),
        ("Secret", "finetune-operator-token-key"),
        ("Service", "finetune-operator"),
        ("ServiceAccount", "finetune-operator"),
    ]


def test_renders_these_objects_with_everything_on(chart: helm_python.Chart) -> None:
    assert sorted(
        (item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"]) for item in render(chart, EVERYTHING)
    ) == [
        ("ClusterRole", "", "tuning-editor"),
        ("ClusterRole", "", "tuning-profiles"),
        ("ClusterRole", "", "tuning-viewer"),
        ("ClusterRoleBinding", "", "tuning-profiles"),
        ("ConfigMap", "grafana", "tuning-dashboard-job"),
        ("ConfigMap", "grafana", "tuning-dashboard-platform"),
        ("CustomResourceDefinition", "", "finetunejobs.finetune.dev"),
        ("CustomResourceDefinition", "", "tuningprofiles.finetune.dev"),
        ("Deployment", "finetune-system", "tuning"),
        ("NetworkPolicy", "finetune-system", "tuning"),
        ("PodDisruptionBudget", "finetune-system", "tuning"),
        ("PodMonitor", "finetune-system", "tuning-trainers"),
        ("PrometheusRule", "finetune-system", "tuning"),
        ("Role", "finetune-system", "tuning-leader"),
        ("Role", "team-a", "tuning"),
        ("Role", "team-b", "tuning"),
        ("RoleBinding", "finetune-system", "tuning-leader"),
        ("RoleBinding", "team-a", "tuning"),
        ("RoleBinding", "team-b", "tuning"),
        ("Service", "finetune-system", "tuning"),
        ("ServiceAccount", "finetune-system", "tuning-operator"),
        ("ServiceMonitor", "finetune-system", "tuning"),
        ("ValidatingAdmissionPolicy", "", "tuning-jobs"),
        ("ValidatingAdmissionPolicyBinding", "", "tuning-jobs"),
    ]


def test_asks_only_for_apis_that_old_and_new_clusters_have(chart: helm_python.Chart) -> None:
    known = {  # stable in Kubernetes 1.20 already, and still there
        "v1",
        "apps/v1",
        "rbac.authorization.k8s.io/v1",
        "apiextensions.k8s.io/v1",
        "networking.k8s.io/v1",
        "policy/v1",  # before 1.21 policy/v1beta1, as the API server says
        "monitoring.coreos.com/v1",  # only with a monitor switched on
        "admissionregistration.k8s.io/v1",  # its policies from 1.30 on, and only where they are switched on
    }
    assert {item["apiVersion"] for item in render(chart, EVERYTHING)} == known
    by_default = {item["apiVersion"] for item in render(chart)}
    assert not by_default & {"monitoring.coreos.com/v1", "admissionregistration.k8s.io/v1"}


def test_crd_is_the_generated_one(chart: helm_python.Chart) -> None:
    rendered = of_kind(render(chart, {"crds": {"enabled": True, "keep": False}}), "CustomResourceDefinition")
    generated = [yaml.safe_load((ROOT / f"crds/{name}.yaml").read_text()) for name in ("finetunejobs", "tuningprofiles")]
    assert sorted(rendered, key=lambda each: str(each["metadata"]["name"])) == generated


def test_jobs_and_their_key_stay_when_the_chart_goes(chart: helm_python.Chart) -> None:
    for kind in "CustomResourceDefinition", "Secret":
        kept, given = of_kind(render(chart), kind), of_kind(render(chart, {"crds": {"keep": False}}), kind)
        assert all(each["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"} for each in kept)
        assert not any("annotations" in each["metadata"] for each in given)
    assert of_kind(render(chart, {"crds": {"enabled": False}}), "CustomResourceDefinition") == []


def test_new_installations_have_keys_of_their_own(chart: helm_python.Chart) -> None:
    first, second = (one(render(chart), "Secret")["data"]["token-key"] for _ in range(2))
    assert first != second
    assert len(first) == 64  # 48 characters in base64


def test_service_and_monitors_select_the_pods_they_mean(chart: helm_python.Chart) -> None:
    objects = render(chart, EVERYTHING)
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert one(objects, "Service")["spec"]["selector"].items() <= labels.items()
    monitor = one(objects, "ServiceMonitor")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= one(objects, "Service")["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in [port["name"] for port in one(objects, "Service")["spec"]["ports"]]
    assert one(objects, "PodMonitor")["spec"]["namespaceSelector"] == {"matchNames": ["team-a", "team-b"]}
    assert one(render(chart, {"metrics": {"podMonitor": {"enabled": True}}}), "PodMonitor")["spec"]["namespaceSelector"] == {"any": True}


def test_series_have_the_labels_that_alerts_and_dashboards_ask_for(chart: helm_python.Chart) -> None:
    objects = render(chart, EVERYTHING)
    assert one(objects, "ServiceMonitor")["spec"]["endpoints"][0]["honorLabels"] is True
    (relabeling,) = one(objects, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["relabelings"]
    # Prometheus writes what is no letter, digit or underscore in the name of a label as an underscore.
    name = re.sub(r"\W", "_", LABEL_JOB_NAME)
    assert relabeling == {"sourceLabels": [f"__meta_kubernetes_pod_label_{name}"], "targetLabel": "name"}


def test_operator_is_asked_for_metrics_by_whom_the_values_name(chart: helm_python.Chart) -> None:
    for values, peer in ({}, {"finetune.dev/metrics": "true"}), (EVERYTHING, {"kubernetes.io/metadata.name": "monitoring"}):
        objects = render(chart, values)
        policy = one(objects, "NetworkPolicy")["spec"]
        assert policy["podSelector"]["matchLabels"].items() <= one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
        assert policy["policyTypes"] == ["Ingress"]
        (ingress,) = policy["ingress"]
        assert ingress["ports"] == [{"port": "http", "protocol": "TCP"}]
        prometheus, test = ingress["from"]
        assert prometheus == {"namespaceSelector": {"matchLabels": peer}}
        (pod,) = of_kind(render_test(chart, values), "Pod")
        assert test["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert of_kind(render(chart, {"networkPolicy": {"enabled": False}}), "NetworkPolicy") == []
    # Nobody is named: nobody but the chart's own test asks.
    nobody = one(render(chart, {"networkPolicy": {"metricsFrom": []}}), "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert [peer.keys() for peer in nobody] == [{"podSelector"}]


def test_drain_takes_one_replica_after_the_other(chart: helm_python.Chart) -> None:
    objects = render(chart, {"podDisruptionBudget": {"enabled": True}})
    budget = one(objects, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"].items() <= one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()


def test_pod_monitor_finds_the_heads_of_jobs(chart: helm_python.Chart) -> None:
    status = Status(attempt=Attempt(number=1))
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "j", "namespace": "n", "uid": "u"},
        "spec": {
            "model": {"source": "pvc://claim/model"},
            "data": {"train": {"source": "pvc://claim/train.jsonl"}},
            "method": {"lora": {}},
            "output": {"storage": "pvc://claim/out"},
        },
    }
    (head,) = of_kind(list(desired_objects(job_from(manifest), status, Settings())), "Pod")
    monitor = one(render(chart, EVERYTHING), "PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= head["metadata"]["labels"].items()
    assert monitor["podMetricsEndpoints"][0]["port"] in [port["name"] for port in head["spec"]["containers"][0]["ports"]]


def test_network_policies_of_jobs_let_the_operator_in(chart: helm_python.Chart) -> None:
    # The policy names the operator by this label, whatever the release is called (finetune_operator.plan).
    for values in {}, EVERYTHING:
        labels = one(render(chart, values), "Deployment")["spec"]["template"]["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "finetune-operator"


def test_notes_name_the_next_commands(chart: helm_python.Chart) -> None:
    (notes,) = [text for path, text in chart.render(EVERYTHING, **RELEASE).items() if path.endswith("NOTES.txt")]
    assert "team-a, team-b" in notes
    assert "kubectl -n finetune-system rollout status deployment/tuning" in notes
    assert notes.count("kubectl ") == 3


def test_versions_agree(chart: helm_python.Chart) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart.metadata["appVersion"]}"' in project
    assert chart.metadata["kubeVersion"] == ">=1.20.0-0"


def test_names_that_read_as_numbers_or_truths_stay_words(chart: helm_python.Chart) -> None:
    """Each is a name that Kubernetes allows, and that YAML takes for something else where it stands without quotes."""
    values = {**EVERYTHING, "watchNamespaces": ["1e3", "true", "0755"], "priorityClassName": "1", "tokenKey": {"existingSecret": "12"}}
    values |= {"serviceAccount": {"create": True, "name": "007"}, "metrics": {**EVERYTHING["metrics"]}}
    values["metrics"]["dashboards"] = {**EVERYTHING["metrics"]["dashboards"], "namespace": "2024"}
    texts = chart.render(values, name="42", namespace="2026")
    objects = [each for path, text in texts.items() if not path.endswith(".txt") for each in yaml.safe_load_all(text) if each]
    assert {each["metadata"].get("namespace") for each in objects} == {None, "2026", "1e3", "true", "0755", "2024"}
    assert all(isinstance(each["metadata"]["name"], str) for each in objects)
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    assert (pod["serviceAccountName"], pod["priorityClassName"]) == ("007", "1")
    assert pod["volumes"][0]["secret"]["secretName"] == "12"
    labels = [each["metadata"].get("labels", {}).get("app.kubernetes.io/instance", "42") for each in objects]
    assert set(labels) == {"42"}
    bound = [subject for each in of_kind(objects, "RoleBinding") for subject in each["subjects"]]
    assert {subject["namespace"] for subject in bound} == {"2026"}


@pytest.mark.parametrize("name", ["2nd", "a.b"])
def test_a_name_that_no_service_may_have_is_refused(chart: helm_python.Chart, name: str) -> None:
    with pytest.raises(helm_python.HelmValuesError, match="fullnameOverride"):
        chart.validate_schema({"fullnameOverride": name})
