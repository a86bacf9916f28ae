"""A cluster with the operator in it: the chart installed once for all tests, a namespace with a volume, a model and data.

KUBECONFIG names the cluster (kind, k3d or any other); FINETUNE_OPERATOR_IMAGE and FINETUNE_TRAINER_IMAGE name images that its nodes have.
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import helm_python
import pytest
from tests.e2e import teacher
from tests.e2e.kubectl import KINDS, Kubectl, KubectlError, wait_until
from tests.e2e.names import CHART, CLAIM, CRD, DATA, MODELS, PROFILE_CRD, RELEASE, ROOT, STORAGE, STORAGE_POD, SYSTEM

from finetune_api import LABEL_JOB_UID

RESTRICTED = ("pod-security.kubernetes.io/enforce=restricted", "pod-security.kubernetes.io/enforce-version=latest")


@dataclass(frozen=True)
class Images:
    """Images that the cluster's nodes have."""

    operator: str
    trainer: str


@pytest.fixture(scope="session")
def images() -> Images:
    names = [os.environ.get(name, "") for name in ("FINETUNE_OPERATOR_IMAGE", "FINETUNE_TRAINER_IMAGE")]
    if not all(names):
        pytest.skip("FINETUNE_OPERATOR_IMAGE and FINETUNE_TRAINER_IMAGE name no images: `make e2e` builds them and sets both")
    if not shutil.which("kubectl"):
        pytest.fail("kubectl is not on PATH")
    try:
        Kubectl("default")("version")
    except KubectlError as error:
        pytest.fail(f"no cluster answers; KUBECONFIG is {os.environ.get('KUBECONFIG')!r}: {error}")
    return Images(*names)


@pytest.fixture(scope="session")
def kubectl(images: Images) -> Iterator[Kubectl]:
    """kubectl in a namespace of its own, which goes away with all that is in it."""
    name = f"finetune-e2e-{secrets.token_hex(3)}"
    kubectl = Kubectl(name)
    kubectl("create", "namespace", name)
    try:
        yield kubectl
    finally:
        kubectl("delete", "namespace", name, timeout=300)


@pytest.fixture(scope="session")
def release(images: Images, kubectl: Kubectl) -> Iterator[Kubectl]:
    """The operator, installed from the chart for the tests' namespace; kubectl in the operator's namespace."""
    system = Kubectl(SYSTEM)
    if system.find("namespace", SYSTEM):
        pytest.fail(
            f"the namespace {SYSTEM} exists: the tests install the operator there and remove both, so they leave one that is there alone"
        )
    values = {
        "image": _image(images.operator),
        "trainer": {"image": _image(images.trainer), "head": {"cpu": "500m", "memory": "2Gi"}, "graceSeconds": 40},
        "operator": {"pollSeconds": 2, "retryBaseSeconds": 2},
        "watchNamespaces": [kubectl.namespace],
        "crds": {"enabled": _knows_cel(system), "keep": False},
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
    }
    crd_was_there = system.find("crd", CRD) is not None
    if not values["crds"]["enabled"]:
        for name in "finetunejobs", "tuningprofiles":
            system("apply", "--validate=false", "--filename", str(ROOT / f"crds/{name}.yaml"))
    else:
        _hand_over_crd(system)
    with helm_python.Config(namespace=SYSTEM) as helm:
        try:
            helm.install(str(CHART), RELEASE, values, create_namespace=True, wait="watcher", timeout=180)
            yield system
        except helm_python.HelmError:
            _print(system, "describe", "pods")
            raise
        finally:
            helm.uninstall(RELEASE, ignore_not_found=True)
            system("delete", "namespace", SYSTEM, "--ignore-not-found", timeout=120)
            if not crd_was_there:
                system("delete", "crd", CRD, PROFILE_CRD, "--ignore-not-found")


def _knows_cel(kubectl: Kubectl) -> bool:
    """Whether the API server knows the CRD's rules. Helm will not send what an older one's schema does not have."""
    version = json.loads(kubectl("version", "--output", "json"))["serverVersion"]
    return (int(version["major"]), int(version["minor"].rstrip("+"))) >= (1, 25)


def _hand_over_crd(kubectl: Kubectl) -> None:
    """Let the chart take over the CRDs that somebody has applied by hand."""
    for name in CRD, PROFILE_CRD:
        if kubectl.find("crd", name) is not None:
            kubectl("label", "--overwrite", "crd", name, "app.kubernetes.io/managed-by=Helm")
            kubectl(
                "annotate", "--overwrite", "crd", name, f"meta.helm.sh/release-name={RELEASE}", f"meta.helm.sh/release-namespace={SYSTEM}"
            )


def _image(name: str) -> dict[str, str]:
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"}


@pytest.fixture(scope="session")
def storage(kubectl: Kubectl, images: Images) -> Iterator[str]:
    """The name of a running pod that sees the quickstart's volume at /storage. The base model and the data are on it.

    They come there as the quickstart tells its users. The namespace is held to the restricted Pod Security Standard from then on.
    """
    volume = _volume(kubectl, images)
    kubectl("label", "namespace", kubectl.namespace, *RESTRICTED)
    kubectl.apply_file(STORAGE)
    kubectl("wait", f"pod/{STORAGE_POD}", "--for=condition=Ready", "--timeout=180s", timeout=200)
    kubectl("cp", str(MODELS), f"{STORAGE_POD}:/storage/models")
    kubectl("cp", str(DATA), f"{STORAGE_POD}:/storage/support")
    kubectl("delete", "pod", STORAGE_POD)
    kubectl.apply(_reader(images.trainer))
    kubectl("wait", "pod/reader", "--for=condition=Ready", "--timeout=120s", timeout=140)
    _look_up(kubectl)
    try:
        yield "reader"
    finally:
        kubectl.python("reader", _EMPTY)
        kubectl("delete", "pod", "reader")
        if volume:
            kubectl("delete", "persistentvolume", volume, "--wait=false")


def _look_up(kubectl: Kubectl) -> None:
    """Fail at once where pods cannot look up Services: workers find their head by name, so every job would wait to the end of its time."""
    try:
        kubectl.python("reader", "import socket; print(socket.getaddrinfo('kubernetes.default.svc', 443))")
    except KubectlError as error:
        pytest.exit(f"pods of this cluster cannot look up kubernetes.default.svc, its DNS does not answer: {error}", returncode=1)


@pytest.fixture(scope="session")
def endpoint(kubectl: Kubectl, images: Images, storage: str) -> None:
    """A teacher behind an endpoint."""
    pod = _pod(teacher.NAME, images.trainer, teacher.PROGRAM, {"emptyDir": {}}, user=10001)
    pod["metadata"]["labels"] = {"app": teacher.NAME}
    kubectl.apply(pod, teacher.service())
    kubectl("wait", f"pod/{teacher.NAME}", "--for=condition=Ready", "--timeout=120s", timeout=140)


@pytest.fixture(scope="session")
def writer(kubectl: Kubectl, images: Images, storage: str) -> str:
    """The URL of the closed loop's writer of content points, which runs in a pod."""
    program = f"import sys; sys.argv[1:] = ['--host', '0.0.0.0', '--port', '8099']\n{(ROOT / 'examples/extractive_writer.py').read_text()}"
    pod = _pod("writer", images.trainer, program, {"emptyDir": {}}, user=10001)
    pod["metadata"]["labels"] = {"app": "writer"}
    service = {"selector": {"app": "writer"}, "ports": [{"port": 8099}]}
    kubectl.apply(pod, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "writer"}, "spec": service})
    kubectl("wait", "pod/writer", "--for=condition=Ready", "--timeout=120s", timeout=140)
    return f"http://writer.{kubectl.namespace}.svc:8099/v1"


_EMPTY = """
import pathlib, shutil
for path in pathlib.Path("/storage").iterdir():
    shutil.rmtree(path)
"""


def _volume(kubectl: Kubectl, images: Images) -> str | None:
    """A folder of the node as a volume that every user may write to, where the cluster does not make volumes itself."""
    classes = kubectl.get("storageclasses")["items"]
    default = "storageclass.kubernetes.io/is-default-class"
    if any(item["metadata"].get("annotations", {}).get(default) == "true" for item in classes):
        return None
    name = kubectl.namespace
    folder = {"path": f"/var/tmp/{name}", "type": "DirectoryOrCreate"}
    spec = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteOnce"],
        "persistentVolumeReclaimPolicy": "Retain",
        "storageClassName": "",
        "claimRef": {"namespace": name, "name": CLAIM},
        "hostPath": folder,
    }
    kubectl.apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec})
    opener = _pod("opener", images.trainer, "import os; os.chmod('/storage', 0o777)", {"hostPath": folder}, user=0)
    kubectl.apply(opener)
    wait_until("the folder is open to all", lambda: kubectl.get("pod", "opener")["status"]["phase"] == "Succeeded", 120)
    kubectl("delete", "pod", "opener")
    return name


def _reader(image: str) -> dict[str, Any]:
    """A pod that waits to be told what to do."""
    return _pod("reader", image, "import signal; signal.pause()", {"persistentVolumeClaim": {"claimName": CLAIM}}, user=10001)


def _pod(name: str, image: str, program: str, volume: dict[str, Any], user: int) -> dict[str, Any]:
    """A pod that runs a Python program and sees a volume at /storage; it keeps to the restricted standard unless its user is root."""
    container = {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", program],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "storage", "mountPath": "/storage"}],
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsUser": user, "runAsNonRoot": user != 0, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "storage", **volume}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


@pytest.fixture(autouse=True)
def what_was_there(request: pytest.FixtureRequest, kubectl: Kubectl) -> Iterator[None]:
    """When a test fails: the jobs, the pods' logs and the events, for whoever looks into it. Then its jobs go."""
    yield
    outcome = request.node.stash.get(_FAILED, False)
    if not outcome:
        return
    _print(kubectl, "get", "finetunejobs", "--output", "yaml")
    _print(kubectl, "get", KINDS, "--output", "wide")
    _print(kubectl, "get", "events", "--sort-by", ".lastTimestamp")
    for pod in kubectl.names("pods", LABEL_JOB_UID):
        _print(kubectl, "logs", pod, "--tail", "60")
    _print(Kubectl(SYSTEM), "logs", f"deployment/{RELEASE}", "--tail", "120")
    # What it left must not take the room that the next test's pods need.
    _print(kubectl, "delete", "finetunejobs", "--all", "--timeout=120s")


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.when == "call":
        item.stash[_FAILED] = report.failed
    return report


def _print(kubectl: Kubectl, *arguments: str) -> None:
    try:
        text = kubectl(*arguments)
    except KubectlError as error:
        text = str(error)
    sys.stdout.write(f"\n--- kubectl {' '.join(arguments)}\n{text}\n")
