"""The operator's pod: restricted, and told what the values say."""

from pathlib import Path
from typing import Any

import helm_python
import pytest
from tests.unit.chart.rendering import EVERYTHING, of_kind, one, render, render_test

from finetune_operator.settings import Settings, settings_from


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_operator_pod_keeps_to_the_restricted_standard(chart: helm_python.Chart, values: dict[str, Any]) -> None:
    pod = one(render(chart, values), "Deployment")["spec"]["template"]["spec"]
    for container in pod["containers"]:
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
        assert [port for port in container["ports"] if port["name"] == "http"] == [
            {"name": "http", "containerPort": 8080, "protocol": "TCP"}
        ]
    assert_restricted(pod)
    assert_restricted(one(render_test(chart, values), "Pod")["spec"])


def assert_restricted(pod: dict[str, Any]) -> None:
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {next(iter(volume.keys() - {"name"})) for volume in pod.get("volumes", ())} <= {"secret", "emptyDir", "configMap", "projected"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"]["cpu"]


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
        require_profile=True,
        log_level="DEBUG",
    )


def test_default_values_are_the_operators_own_defaults(chart: helm_python.Chart, tmp_path: Path) -> None:
    settings, _ = read_settings(environment(render(chart)), tmp_path)
    assert settings == Settings(
        token_key=b"0123456789abcdef0123456789abcdef", trainer_image=f"finetune-trainer:{chart.metadata['appVersion']}"
    )


def test_every_variable_of_the_chart_is_read(chart: helm_python.Chart, tmp_path: Path) -> None:
    given = {name for name in environment(render(chart)) if name.startswith("FINETUNE_")}
    _, asked = read_settings(environment(render(chart)), tmp_path)
    assert given <= asked
    assert asked - given == {"FINETUNE_REPORT_PORT"}  # the image's own


def test_token_key_is_mounted_where_it_is_read(chart: helm_python.Chart) -> None:
    for values, secret in ({}, "finetune-operator-token-key"), (EVERYTHING, "our-key"):
        objects = render(chart, values)
        pod = one(objects, "Deployment")["spec"]["template"]["spec"]
        (volume,) = [volume for volume in pod["volumes"] if "secret" in volume]
        (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == volume["name"]]
        assert volume["secret"] == {"secretName": secret, "defaultMode": 0o440}
        assert environment(objects)["FINETUNE_TOKEN_KEY_FILE"] == mount["mountPath"] + "/token-key"


def test_two_replicas_without_election_are_never_up_at_once_during_an_upgrade(chart: helm_python.Chart) -> None:
    objects = render(chart, {"leaderElection": False})
    assert one(objects, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert environment(objects)["FINETUNE_LEADER_ELECTION"] == "false"
    assert of_kind(objects, "Role") == []
