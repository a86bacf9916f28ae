"""A pod's manifest as a command and an environment of this machine."""

import sys
from pathlib import Path

import pytest

from finetune_operator.local.pods import ended_status, exit_code, gpus_wanted, launch, rewritten
from finetune_operator.local.state import State
from finetune_operator.observed import pod_from

ROOT = Path("/home/ann/my job (1)/.finetune")


def pod(env, mounts=(), volumes=(), command=("python", "-m", "x"), **container):
    return {
        "metadata": {"name": "j-1-head", "namespace": "default"},
        "spec": {
            "containers": [{"name": "head", "command": list(command), "env": env, "volumeMounts": list(mounts), **container}],
            "volumes": list(volumes),
        },
    }


def started(manifest, *, inherited=None, extra=None, programs=None):
    return launch(manifest, State(ROOT), {"FINETUNE_RAY_PORT": 21001}.__getitem__, inherited or {}, extra or {}, programs or {})


VOLUMES = (
    {"name": "job", "configMap": {"name": "j-1"}},
    {"name": "token", "secret": {"secretName": "j-1"}},
    {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
    {"name": "home", "emptyDir": {}},
)
MOUNTS = (
    {"name": "job", "mountPath": "/etc/finetune/job"},
    {"name": "token", "mountPath": "/etc/finetune/token"},
    {"name": "data", "mountPath": "/mnt/finetune/claims/data"},
    {"name": "home", "mountPath": "/home/finetune"},
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/etc/finetune/job/job.json", f"{ROOT}/configmaps/j-1/job.json"),
        ("/etc/finetune/token/token", f"{ROOT}/secrets/j-1/token"),
        ("/mnt/finetune/claims/data", f"{ROOT}/claims/data"),
        ("/home/finetune", f"{ROOT}/pods/j-1-head/volumes/home"),
        ("/dev/termination-log", f"{ROOT}/pods/j-1-head/termination-log"),
        ("/etc/finetune/jobs/x", "/etc/finetune/jobs/x"),  # a neighbour, not inside
        ("/usr/lib", "/usr/lib"),
        ("etc/finetune/job", "etc/finetune/job"),
        ("text with /etc/finetune/job in it", "text with /etc/finetune/job in it"),
    ],
)
def test_paths_in_volumes_become_paths_of_this_machine(value, expected):
    manifest = pod([{"name": "WHERE", "value": value}], MOUNTS, VOLUMES, command=("run", value))
    plan = started(manifest)
    assert plan.env["WHERE"] == expected
    assert plan.command == ("run", expected)


def test_the_deepest_volume_wins():
    paths = {"/a": Path("/x"), "/a/b": Path("/y")}
    assert rewritten("/a/b/c", paths) == "/y/c"
    assert rewritten("/a/c", paths) == "/x/c"


def test_a_subpath_is_a_folder_of_the_volume():
    manifest = pod([{"name": "WHERE", "value": "/m/f"}], [{"name": "data", "mountPath": "/m", "subPath": "in"}], VOLUMES)
    assert started(manifest).env["WHERE"] == f"{ROOT}/claims/data/in/f"


def test_ports_are_free_ones_and_other_numbers_stay():
    env = [{"name": "FINETUNE_RAY_PORT", "value": "6379"}, {"name": "FINETUNE_ATTEMPT", "value": "6379"}]
    plan = started(pod(env))
    assert (plan.env["FINETUNE_RAY_PORT"], plan.env["FINETUNE_ATTEMPT"]) == ("21001", "6379")


def test_python_is_this_python_and_a_program_can_be_replaced():
    assert started(pod([])).command == (sys.executable, "-m", "x")
    assert started(pod([]), programs={"head": ["fake", "head"]}).command == ("fake", "head")


def test_what_would_lead_a_trainer_astray_is_not_inherited():
    inherited = {"PATH": "/bin", "RAY_ADDRESS": "elsewhere", "FINETUNE_TOKEN_KEY_FILE": "/k", "KUBERNETES_SERVICE_HOST": "1", "RANK": "3"}
    plan = started(pod([{"name": "A", "value": "1"}, {"name": "B", "value": "1"}]), inherited=inherited, extra={"B": "2"})
    assert plan.env == {"PATH": "/bin", "A": "1", "B": "2"}


def test_only_the_pods_own_volumes_are_made():
    assert started(pod([], MOUNTS, VOLUMES)).folders == (ROOT / "pods/j-1-head/volumes/home",)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (pod([{"name": "A", "valueFrom": {}}]), "the variable A"),
        (pod([], volumes=[{"name": "v", "hostPath": {"path": "/"}}]), "the volume v"),
    ],
)
def test_what_a_process_cannot_have_is_named(manifest, words):
    with pytest.raises(ValueError, match=words):
        started(manifest)


def test_gpus_are_the_limits_of_the_container():
    assert gpus_wanted(pod([])) == 0
    assert gpus_wanted(pod([], resources={"limits": {"nvidia.com/gpu": "2", "cpu": 4}})) == 2


def test_a_signal_is_an_exit_code_as_in_a_container():
    assert [exit_code(code) for code in (0, 1, 143, -9, -15)] == [0, 1, 143, 137, 143]


def test_the_loop_reads_how_a_process_ended():
    labels = {"finetune.dev/role": "head", "finetune.dev/attempt": "1"}
    meta = {"name": "j-1-head", "namespace": "default", "uid": "u", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}
    seen = pod_from({"metadata": meta, "status": ended_status("head", 137, "last words", "2026-01-01T00:00:01Z")})
    assert seen.finished
    assert seen.exit is not None
    assert (seen.phase, seen.exit.code, seen.exit.message) == ("Failed", 137, "last words")
