"""The failure doctor on what a real cluster says: small pods that fail, each in its way, and the reason that is found in their objects.

No operator is needed: `diagnosis` and `failures` are pure, and are given the very objects, Events and refusals of the API server.
"""

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from tests.e2e.conftest import Images
from tests.e2e.kubectl import Kubectl, KubectlError, wait_until

from finetune_api import LABEL_ATTEMPT, LABEL_ROLE
from finetune_api.reasons import ADVICE
from finetune_operator.diagnosis import refusal
from finetune_operator.failures import ending_of
from finetune_operator.observed import Pod, pod_from

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

Raw = dict[str, Any]


@pytest.fixture(scope="module")
def place(images: Images) -> Iterator[Kubectl]:
    """A namespace of its own: quotas and limits are set in it."""
    name = f"finetune-e2e-failures-{secrets.token_hex(3)}"
    kubectl = Kubectl(name)
    kubectl("create", "namespace", name)
    try:
        wait_until("the namespace has its service account", lambda: kubectl.find("serviceaccount", "default"), 60)
        yield kubectl
    finally:
        kubectl("delete", "namespace", name, timeout=300)


def pod(name: str, image: str, program: str = "", **more: Any) -> Raw:
    """A pod with the labels of a head; `program` is Python, `more` replaces fields of its container or, as `spec_...`, of the pod."""
    container = {
        "name": "head",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", program or "pass"],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **{key: value for key, value in more.items() if not key.startswith("spec_")},
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
        **{key.removeprefix("spec_"): value for key, value in more.items() if key.startswith("spec_")},
    }
    labels = {LABEL_ATTEMPT: "1", LABEL_ROLE: "head"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def look(kubectl: Kubectl, name: str) -> Pod:
    """The pod as the operator sees it, with its Events."""
    raw = kubectl.get("pod", name)
    events = kubectl.get("events", "--field-selector", f"involvedObject.uid={raw['metadata']['uid']}")["items"]
    return pod_from(raw, events)


def mounting(volume: Raw) -> Raw:
    return {"spec_volumes": [{"name": "given", **volume}], "volumeMounts": [{"name": "given", "mountPath": "/given"}]}


def asking(**resources: str) -> Raw:
    amounts = {name.replace("nvidia_gpu", "nvidia.com/gpu"): amount for name, amount in resources.items()}
    return {"resources": {"limits": amounts, "requests": amounts}}


STUCK: dict[str, tuple[Raw, str]] = {
    "image-that-does-not-exist": ({"image": "registry.invalid/finetune/none:1"}, "ImagePullFailed"),
    "image-name-that-is-none": ({"image": "UPPER CASE"}, "ImagePullFailed"),
    "claim-that-does-not-exist": (mounting({"persistentVolumeClaim": {"claimName": "absent"}}), "VolumeClaimNotFound"),
    "secret-that-does-not-exist": (mounting({"secret": {"secretName": "absent"}}), "SecretNotFound"),
    "config-map-that-does-not-exist": (mounting({"configMap": {"name": "absent"}}), "ConfigMapNotFound"),
    "secret-of-a-variable": (
        {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "a"}}}]},
        "SecretNotFound",
    ),
    "more-gpus-than-there-are": (asking(nvidia_gpu="1000"), "Unschedulable"),
    "selector-that-no-node-matches": ({"spec_nodeSelector": {"finetune.dev/absent": "true"}}, "Unschedulable"),
    "user-that-must-not-be-root": ({"securityContext": {"runAsNonRoot": True, "runAsUser": 0}}, "ContainerStartFailed"),
}


@pytest.mark.parametrize(("name", "more", "reason"), [(name, *case) for name, case in STUCK.items()], ids=STUCK)
def test_a_pod_that_does_not_run_says_why(name: str, more: Raw, reason: str, place: Kubectl, images: Images) -> None:
    manifest = pod(name, images.trainer, **{key: value for key, value in more.items() if key != "image"})
    manifest["spec"]["containers"][0]["image"] = more.get("image", images.trainer)
    place.apply(manifest)
    try:
        waiting = wait_until(f"{name} is stuck", lambda: look(place, name).waiting, 120)
        assert waiting.reason == reason, waiting.message
        assert waiting.message.startswith(f"pod {name}: ")
    finally:
        place("delete", "pod", name, "--wait=false")


def child(program: str) -> list[str]:
    """A shell as process 1, which signals from within do not end, and a program below it that a signal may end."""
    return ["sh", "-c", 'python -X faulthandler -c "$0"; exit $?', program]


EAT = "held = []\nwhile True: held.append(bytearray(1 << 20))"
MAP = """
import mmap
f = open('/dev/shm/x', 'wb+')
f.truncate(1 << 30)
m = mmap.mmap(f.fileno(), 1 << 30)
for i in range(0, 1 << 30, 4096): m[i] = 1
"""
LIMITED = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))\nbytearray(1 << 30)"
SMALL = {"spec_volumes": [{"name": "small", "emptyDir": {"sizeLimit": "1Mi"}}], "volumeMounts": [{"name": "small", "mountPath": "/small"}]}
ENDED: dict[str, tuple[str, Raw, str, int | None, str]] = {
    "memory-beyond-the-limit": (EAT, asking(memory="64Mi", cpu="100m"), "OOMKilled", 137, ""),
    "exit-code-1": ("raise KeyError('prompt')", {}, "InternalError", 1, "KeyError: 'prompt'"),
    "killed": ("", {"command": child("import os; os.kill(os.getpid(), 9)")}, "HeadLost", 137, ""),
    "segmentation-fault": (
        "",
        {"command": child("import ctypes; ctypes.string_at(0)")},
        "ProcessCrashed",
        139,
        "Fatal Python error: Segmentation fault",
    ),
    "bus-error": ("", {"command": child(MAP)}, "SharedMemoryFull", 135, ""),
    "no-memory-for-a-process": (LIMITED, {}, "HostOutOfMemory", 1, "MemoryError"),
    "full-disk": ("open('/dev/shm/x', 'wb').write(bytes(1 << 30))", {}, "StorageFull", 1, "No space left on device"),
    "program-that-is-not-there": ("", {"command": ["/absent/program"]}, "ContainerStartFailed", None, ""),
    "full-volume": (
        "import time\nopen('/small/x', 'wb').write(bytes(8 << 20)); time.sleep(600)",
        SMALL,
        "StorageFull",
        None,
        "",
    ),
}


@pytest.mark.parametrize(("name", "case"), ENDED.items(), ids=ENDED)
def test_a_pod_that_failed_says_why(name: str, case: tuple[str, Raw, str, int | None, str], place: Kubectl, images: Images) -> None:
    program, more, reason, code, words = case
    place.apply(pod(name, images.trainer, program, **more))
    try:
        wait_until(f"{name} has ended", lambda: look(place, name).finished, 240)
        ending = ending_of(look(place, name), None, "Prepare")
        assert ending.failure is not None, ending.message
        assert ending.failure.reason == reason, ending.message
        assert (ending.failure.pod, ending.failure.hint is not None) == (name, True)
        assert ending.failure.retryable is ADVICE[ending.reason].retryable
        assert code is None or ending.failure.exit_code == code
        assert words in (ending.failure.log or "")
    finally:
        place("delete", "pod", name, "--wait=false")


def refused(place: Kubectl, manifest: Raw, *options: str) -> str:
    """The API server's words, where it does not take a manifest."""
    try:
        place("create", "--filename", "-", *options, stdin=json.dumps(manifest).encode())
    except KubectlError as error:
        return str(error)
    place("delete", "pod", manifest["metadata"]["name"], "--wait=false")
    return ""


def test_a_quota_that_is_used_up_says_so(place: Kubectl, images: Images) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"requests.nvidia.com/gpu": "0"}}}
    place.apply(quota)
    try:
        wait_until("the quota is counted", lambda: place.get("resourcequota", "none").get("status", {}).get("used"), 60)
        words = wait_until("it is refused", lambda: refused(place, pod("beyond", images.trainer, **asking(nvidia_gpu="1"))), 60)
        assert refusal(words).reason == "QuotaExceeded", words
    finally:
        place("delete", "resourcequota", "none")


def test_a_policy_that_refuses_says_so(place: Kubectl, images: Images) -> None:
    limits = {"limits": [{"type": "Container", "max": {"memory": "16Mi"}}]}
    place.apply({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": limits})
    try:
        words = wait_until("it is refused", lambda: refused(place, pod("large", images.trainer, **asking(memory="64Mi"))), 60)
        assert refusal(words).reason == "AdmissionDenied", words
    finally:
        place("delete", "limitrange", "small")


def test_a_right_that_is_missing_says_so(place: Kubectl, images: Images) -> None:
    nobody = f"--as=system:serviceaccount:{place.namespace}:default"
    words = refused(place, pod("forbidden", images.trainer), nobody)
    assert refusal(words).reason == "Forbidden", words
