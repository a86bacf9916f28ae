"""The chart as Helm 4 reads it: it lints, renders what it should, and refuses values that make no sense."""

from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from finetune_api.status import Attempt, Status
from finetune_operator.kinds import required_lease_rules, required_rules
from finetune_operator.observed import job_from
from finetune_operator.plan import desired_objects
from finetune_operator.settings import Settings, settings_from

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
    "metrics": {
        "serviceMonitor": {"enabled": True, "interval": "10s", "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True, "interval": "5s", "labels": {"release": "prometheus"}},
    },
}


@pytest.fixture(scope="module")
def chart() -> Any:
    with helm_python.Chart.load(CHART) as loaded:
        yield loaded


def render(chart: helm_python.Chart, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
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


def rules_of(role: dict[str, Any]) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of each thing that a role grants."""
    return triples(role["rules"])


def triples(rules: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]
    }


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
        ("ClusterRole", "finetune-operator-viewer"),
        ("ClusterRoleBinding", "finetune-operator"),
        ("CustomResourceDefinition", "finetunejobs.finetune.dev"),
        ("Deployment", "finetune-operator"),
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
        ("ClusterRole", "", "tuning-viewer"),
        ("CustomResourceDefinition", "", "finetunejobs.finetune.dev"),
        ("Deployment", "finetune-system", "tuning"),
        ("PodMonitor", "finetune-system", "tuning-trainers"),
        ("Role", "finetune-system", "tuning-leader"),
        ("Role", "team-a", "tuning"),
        ("Role", "team-b", "tuning"),
        ("RoleBinding", "finetune-system", "tuning-leader"),
        ("RoleBinding", "team-a", "tuning"),
        ("RoleBinding", "team-b", "tuning"),
        ("Service", "finetune-system", "tuning"),
        ("ServiceAccount", "finetune-system", "tuning-operator"),
        ("ServiceMonitor", "finetune-system", "tuning"),
    ]


def test_asks_only_for_apis_that_old_and_new_clusters_have(chart: helm_python.Chart) -> None:
    known = {  # stable in Kubernetes 1.20 already, and still there
        "v1",
        "apps/v1",
        "rbac.authorization.k8s.io/v1",
        "apiextensions.k8s.io/v1",
        "monitoring.coreos.com/v1",  # only with a monitor switched on
    }
    assert {item["apiVersion"] for item in render(chart, EVERYTHING)} == known
    assert "monitoring.coreos.com/v1" not in {item["apiVersion"] for item in render(chart)}


def test_crd_is_the_generated_one(chart: helm_python.Chart) -> None:
    rendered = one(render(chart, {"crds": {"enabled": True, "keep": False}}), "CustomResourceDefinition")
    assert rendered == yaml.safe_load((ROOT / "crds/finetunejobs.yaml").read_text())


def test_jobs_and_their_key_stay_when_the_chart_goes(chart: helm_python.Chart) -> None:
    for kind in "CustomResourceDefinition", "Secret":
        assert one(render(chart), kind)["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
        assert "annotations" not in one(render(chart, {"crds": {"keep": False}}), kind)["metadata"]
    assert of_kind(render(chart, {"crds": {"enabled": False}}), "CustomResourceDefinition") == []


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["cluster", "namespaces"])
def test_operator_is_granted_what_it_uses_and_no_more(chart: helm_python.Chart, values: dict[str, Any]) -> None:
    objects = render(chart, values)
    for_jobs = [
        role
        for role in of_kind(objects, "ClusterRole") + of_kind(objects, "Role")
        if not role["metadata"]["name"].endswith(("-viewer", "-editor", "-leader"))
    ]
    assert len(for_jobs) == (2 if values else 1)
    for role in for_jobs:
        assert rules_of(role) == triples(required_rules())
    (leader,) = [role for role in of_kind(objects, "Role") if role["metadata"]["name"].endswith("-leader")]
    assert rules_of(leader) == triples(required_lease_rules())


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["cluster", "namespaces"])
def test_roles_have_no_wildcard_and_read_no_secret(chart: helm_python.Chart, values: dict[str, Any]) -> None:
    objects = render(chart, values)
    for role in of_kind(objects, "ClusterRole") + of_kind(objects, "Role"):
        granted = rules_of(role)
        assert not any("*" in word for triple in granted for word in triple)
        assert {verb for _, resource, verb in granted if resource.startswith("secrets")} <= {"create", "delete"}
        assert not {resource for _, resource, _ in granted} & {"pods/exec", "pods/attach", "roles", "clusterroles", "rolebindings"}
        assert not {verb for _, _, verb in granted} & {"escalate", "bind", "impersonate"}


def test_every_binding_names_the_operators_account_and_a_role_of_the_chart(chart: helm_python.Chart) -> None:
    for values, account in ({}, "finetune-operator"), (EVERYTHING, "tuning-operator"):
        objects = render(chart, values)
        roles = {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects if "Role" in item["kind"]}
        for binding in of_kind(objects, "RoleBinding") + of_kind(objects, "ClusterRoleBinding"):
            ref = binding["roleRef"]
            assert (ref["kind"], binding["metadata"].get("namespace"), ref["name"]) in roles
            assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "finetune-system"}]
        assert one(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == account


def test_people_get_their_roles_by_aggregation(chart: helm_python.Chart) -> None:
    roles = {role["metadata"]["name"]: role for role in of_kind(render(chart), "ClusterRole")}
    viewer, editor = roles["finetune-operator-viewer"], roles["finetune-operator-editor"]
    assert viewer["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"] == "true"
    assert {verb for _, _, verb in rules_of(viewer)} == {"get", "list", "watch"}
    assert "rbac.authorization.k8s.io/aggregate-to-view" not in editor["metadata"]["labels"]
    assert editor["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"] == "true"
    assert {resource for _, resource, _ in rules_of(editor)} == {"finetunejobs"}  # nobody writes a status but the operator


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_operator_pod_keeps_to_the_restricted_standard(chart: helm_python.Chart, values: dict[str, Any]) -> None:
    pod = one(render(chart, values), "Deployment")["spec"]["template"]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {next(iter(volume.keys() - {"name"})) for volume in pod["volumes"]} <= {"secret", "emptyDir", "configMap", "projected"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"]["cpu"]
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
        assert [port for port in container["ports"] if port["name"] == "http"] == [
            {"name": "http", "containerPort": 8080, "protocol": "TCP"}
        ]


def environment(objects: list[dict[str, Any]]) -> dict[str, str]:
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return {item["name"]: item.get("value", "finetune-system") for item in container["env"]}


class Recorder(dict[str, str]):
    """An environment that remembers what it was asked for."""

    def __init__(self, values: dict[str, str]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def read_settings(env: dict[str, str], tmp_path: Path) -> tuple[Settings, set[str]]:
    key = tmp_path / "token-key"
    key.write_bytes(b"0123456789abcdef0123456789abcdef")
    recorder = Recorder({**env, "FINETUNE_TOKEN_KEY_FILE": str(key)})
    return settings_from(recorder), recorder.asked


def test_values_arrive_in_the_operators_settings(chart: helm_python.Chart, tmp_path: Path) -> None:
    settings, _ = read_settings(environment(render(chart, EVERYTHING)), tmp_path)
    assert settings == Settings(
        token_key=b"0123456789abcdef0123456789abcdef",
        trainer_image="registry.example:5000/finetune/trainer@sha256:" + "ab" * 32,
        operator_namespace="finetune-system",
        watch_namespaces=("team-a", "team-b"),
        head_cpu="500m",
        head_memory="2Gi",
        image_pull_policy="Never",
        image_pull_secrets=("registry", "mirror"),
        service_account="tuner",
        grace_seconds=120,
        poll_seconds=2.5,
        retry_base_seconds=30.0,
        max_concurrent=64,
        leader_election=True,
    )


def test_default_values_are_the_operators_own_defaults(chart: helm_python.Chart, tmp_path: Path) -> None:
    settings, _ = read_settings(environment(render(chart)), tmp_path)
    assert settings == Settings(
        token_key=b"0123456789abcdef0123456789abcdef", trainer_image=f"finetune-trainer:{chart.metadata['appVersion']}"
    )


def test_every_variable_of_the_chart_is_read(chart: helm_python.Chart, tmp_path: Path) -> None:
    given = {name for name in environment(render(chart)) if name.startswith("FINETUNE_")}
    _, asked = read_settings(environment(render(chart)), tmp_path)
    assert given - asked == {"FINETUNE_LOG_LEVEL"}  # read before the settings are
    assert asked - given == {"FINETUNE_REPORT_PORT"}  # the image's own


def test_token_key_is_mounted_where_it_is_read(chart: helm_python.Chart) -> None:
    for values, secret in ({}, "finetune-operator-token-key"), (EVERYTHING, "our-key"):
        objects = render(chart, values)
        pod = one(objects, "Deployment")["spec"]["template"]["spec"]
        (volume,) = [volume for volume in pod["volumes"] if "secret" in volume]
        (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == volume["name"]]
        assert volume["secret"] == {"secretName": secret, "defaultMode": 0o440}
        assert environment(objects)["FINETUNE_TOKEN_KEY_FILE"] == mount["mountPath"] + "/token-key"


def test_new_installations_have_keys_of_their_own(chart: helm_python.Chart) -> None:
    first, second = (one(render(chart), "Secret")["data"]["token-key"] for _ in range(2))
    assert first != second
    assert len(first) == 64  # 48 characters in base64


def test_two_replicas_without_election_are_never_up_at_once_during_an_upgrade(chart: helm_python.Chart) -> None:
    objects = render(chart, {"leaderElection": False})
    assert one(objects, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert environment(objects)["FINETUNE_LEADER_ELECTION"] == "false"
    assert of_kind(objects, "Role") == []


def test_service_and_monitors_select_the_pods_they_mean(chart: helm_python.Chart) -> None:
    objects = render(chart, EVERYTHING)
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert one(objects, "Service")["spec"]["selector"].items() <= labels.items()
    monitor = one(objects, "ServiceMonitor")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= one(objects, "Service")["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in [port["name"] for port in one(objects, "Service")["spec"]["ports"]]
    assert one(objects, "PodMonitor")["spec"]["namespaceSelector"] == {"matchNames": ["team-a", "team-b"]}
    assert one(render(chart, {"metrics": {"podMonitor": {"enabled": True}}}), "PodMonitor")["spec"]["namespaceSelector"] == {"any": True}


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


def test_notes_name_the_next_commands(chart: helm_python.Chart) -> None:
    (notes,) = [text for path, text in chart.render(EVERYTHING, **RELEASE).items() if path.endswith("NOTES.txt")]
    assert "team-a, team-b" in notes
    assert "kubectl -n finetune-system rollout status deployment/tuning" in notes
    assert notes.count("kubectl ") == 3


def test_versions_agree(chart: helm_python.Chart) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart.metadata["appVersion"]}"' in project
    assert chart.metadata["kubeVersion"] == ">=1.20.0-0"
