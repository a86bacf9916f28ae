"""The chart rendered by Helm 4, as objects."""

from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts/finetune-operator"
RELEASE = {"name": "finetune-operator", "namespace": "finetune-system"}

EVERYTHING = {
    "replicaCount": 2,
    "image": {"repository": "registry.example:5000/finetune/operator", "tag": "1.2.3", "pullPolicy": "Always"},
    "crds": {"enabled": True, "keep": True},
    "imagePullSecrets": [{"name": "registry"}],
    "fullnameOverride": "tuning",
    "watchNamespaces": ["team-a", "team-b"],
    "leaderElection": True,
    "requireProfile": True,
    "admissionPolicy": {"enabled": True, "profilesOfNamespace": True, "schemes": ["hf", "pvc"], "remoteCodeOfNamespace": True},
    "trainer": {
        "image": {"repository": "registry.example:5000/finetune/trainer", "digest": "sha256:" + "ab" * 32, "pullPolicy": "Never"},
        "imagePullSecrets": ["registry", "mirror"],
        "serviceAccountName": "tuner",
        "head": {"cpu": "500m", "memory": "2Gi"},
        "graceSeconds": 120,
    },
    "tokenKey": {"existingSecret": "our-key"},
    "operator": {"pollSeconds": 2.5, "retryBaseSeconds": 30, "maxConcurrent": 64, "logLevel": "DEBUG"},
    "serviceAccount": {"create": True, "name": "tuning-operator", "annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/x"}},
    "rbac": {"create": True, "userRoles": True},
    "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": 2, "memory": "2Gi"}},
    "podLabels": {"team": "platform"},
    "podAnnotations": {"example.com/note": "x"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "infra", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "priorityClassName": "system-cluster-critical",
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "networkPolicy": {
        "enabled": True,
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    },
    "podDisruptionBudget": {"enabled": True, "maxUnavailable": "50%"},
    "metrics": {
        "serviceMonitor": {"enabled": True, "interval": "10s", "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True, "interval": "5s", "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "runbookUrl": "https://runbooks.example/finetune", "labels": {"release": "prometheus"}},
        "dashboards": {"enabled": True, "namespace": "grafana", "labels": {"grafana": "1"}, "annotations": {"grafana_folder": "Tuning"}},
    },
}
"""Values that leave no default in place."""


HOOK = "helm.sh/hook"


def render(chart: helm_python.Chart, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What an installation makes."""
    return [item for item in render_all(chart, values) if HOOK not in item["metadata"].get("annotations", {})]


def render_test(chart: helm_python.Chart, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What `helm test` makes."""
    return [item for item in render_all(chart, values) if item["metadata"].get("annotations", {}).get(HOOK) == "test"]


def render_all(chart: helm_python.Chart, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    manifests = chart.render(values, **RELEASE)
    return [
        document
        for path, text in manifests.items()
        if not path.endswith("NOTES.txt")
        for document in yaml.safe_load_all(text)
        if document is not None
    ]


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [item for item in objects if item["kind"] == kind]


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = of_kind(objects, kind)
    return found
