"""What a cluster does to running jobs: drains, kills, an operator or an API server that is away. Each goes on; nothing is there twice."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator

import helm_python
import psutil
import pytest
from tests.e2e.kubectl import Kubectl, KubectlError, assert_all_gone, wait_until
from tests.e2e.names import CHART, RELEASE, SYSTEM
from tests.e2e.test_whole_way import ENDLESS, condition, job, pods_of, status_of

from finetune_api import LABEL_JOB_NAME, LABEL_JOB_UID

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

AWAY_SECONDS = 60
PREEMPTIONS = 20
LONG = {"epochs": 400, "globalBatchSize": 8, "maxSequenceLength": 128}
"""Steps enough that a job is still training after all preemptions of a test."""


def step_of(kubectl: Kubectl, name: str) -> int:
    return int(status_of(kubectl, name).get("progress", {}).get("step", 0))


def trains(kubectl: Kubectl, name: str, beyond: int = 0, seconds: float = 240) -> int:
    """Wait until a job has trained beyond a step; the step that it is at."""
    assert condition(status_of(kubectl, name), "Complete").get("status") != "True", "the job is too short for this test"
    return int(wait_until(f"{name} trains beyond step {beyond}", lambda: (now := step_of(kubectl, name)) > beyond and now, seconds))


def gone(kubectl: Kubectl, name: str) -> None:
    kubectl("delete", "ftj", name)
    assert_all_gone(kubectl, name, 120)


def test_a_drained_node_costs_no_more_than_a_step(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    """All pods of the job get SIGTERM at once, since there is one node that could have them."""
    name = "drained"
    kubectl.apply(job(name, training=LONG))
    before = trains(kubectl, name, 5)
    node = kubectl.get("pod", f"{name}-1-head")["spec"]["nodeName"]
    try:
        for each in kubectl.names("nodes"):
            kubectl("cordon", each)
        kubectl(
            "drain",
            node,
            f"--pod-selector={LABEL_JOB_NAME}={name}",
            "--ignore-daemonsets",
            "--delete-emptydir-data",
            "--force",
            "--timeout=120s",
            timeout=140,
        )
    finally:
        for each in kubectl.names("nodes"):
            kubectl("uncordon", each)
    trains(kubectl, name, before)
    attempt = status_of(kubectl, name)["attempt"]
    assert (attempt["failures"], attempt["preemptions"], attempt["number"]) == (0, 1, 2)
    assert attempt.get("lostSteps", 0) <= 1
    gone(kubectl, name)


_KILL = """
import os, signal
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        words = open(f"/proc/{pid}/cmdline").read()
        if int(pid) not in (1, os.getpid()) and words.startswith(PREFIX):
            os.kill(int(pid), signal.SIGKILL)
            print(words)
    except OSError:
        pass
"""


@pytest.mark.long
@pytest.mark.parametrize(("role", "prefix", "attempts"), [("worker-0", "ray::", 1), ("head", "", 2)])
def test_processes_that_are_killed_are_made_anew(
    release: Kubectl, kubectl: Kubectl, storage: str, role: str, prefix: str, attempts: int
) -> None:
    """SIGKILL to the training process of a worker; to every process of the head's pod but its first, which the kernel protects."""
    name = f"killed-{role}"
    kubectl.apply(job(name, training=LONG))
    before = trains(kubectl, name, 5)
    assert kubectl.python(f"{name}-1-{role}", _KILL.replace("PREFIX", repr(prefix))).strip(), "nothing was killed"
    wait_until(f"attempt {attempts}", lambda: status_of(kubectl, name)["attempt"]["number"] == attempts, 180)
    trains(kubectl, name, before, 300)
    attempt = status_of(kubectl, name)["attempt"]
    assert attempt["number"] == attempts
    assert attempt.get("lostSteps", 0) <= 5 + 5, "at most an interval of checkpoints, and the steps that were not told of yet"
    gone(kubectl, name)


@pytest.mark.long
def test_an_operator_that_is_away_is_not_missed(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    name = "unwatched"
    kubectl.apply(job(name, training=ENDLESS))
    before = trains(kubectl, name, 5)
    pods = uids(kubectl, name)
    try:
        release("scale", f"deployment/{RELEASE}", "--replicas=0")
        time.sleep(AWAY_SECONDS)
        assert step_of(kubectl, name) <= before + 1000, "nobody writes the status"
        assert uids(kubectl, name) == pods
    finally:
        release("scale", f"deployment/{RELEASE}", "--replicas=1")
        release("rollout", "status", f"deployment/{RELEASE}", "--timeout=120s", timeout=140)
    trains(kubectl, name, before)
    assert uids(kubectl, name) == pods
    assert status_of(kubectl, name)["attempt"]["number"] == 1
    gone(kubectl, name)


def uids(kubectl: Kubectl, name: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in kubectl.get("pods", "--selector", f"{LABEL_JOB_NAME}={name}")["items"]}


@pytest.mark.long
def test_two_operators_do_the_work_of_one(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    """The one that leads is killed: the other takes over, and nothing that was made is made again."""
    name = "two-operators"
    holder: Callable[[], str] = lambda: str(release.get("leases")["items"][0]["spec"]["holderIdentity"])  # noqa: E731
    try:
        release("scale", f"deployment/{RELEASE}", "--replicas=2")
        release("rollout", "status", f"deployment/{RELEASE}", "--timeout=120s", timeout=140)
        kubectl.apply(job(name, training=ENDLESS))
        before = trains(kubectl, name, 5)
        pods, leader = uids(kubectl, name), holder()
        release("delete", "pod", leader.split("_")[0], "--grace-period=0", "--force")
        wait_until("the other leads", lambda: holder() not in (leader, ""), 60)
        trains(kubectl, name, before)
    finally:
        release("scale", f"deployment/{RELEASE}", "--replicas=1")
    assert uids(kubectl, name) == pods
    assert len(pods_of(kubectl, name, "head")) == 1
    gone(kubectl, name)


def doomed(kubectl: Kubectl) -> Kubectl:
    """kubectl in a namespace that a test makes and deletes; the operator watches it that long."""
    return Kubectl(f"{kubectl.namespace}-doomed")


def test_a_namespace_that_is_deleted_takes_its_jobs_along(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    """The head waits for a claim that never comes. The operator neither ends nor asks without end."""
    other = doomed(kubectl)
    other("create", "namespace", other.namespace)
    with watching(other.namespace):
        other.apply(job("doomed"))
        wait_until("a head", lambda: pods_of(other, "doomed", "head"), 120)
        restarts = _restarts(release)
        other("delete", "namespace", other.namespace, "--wait=false")
        wait_until("the namespace has gone", lambda: not other.find("namespace", other.namespace), 180)
        said = [line for line in release("logs", f"deployment/{RELEASE}", "--since=180s").splitlines() if other.namespace in line]
        assert len(said) <= 60, said[-5:]
        assert _restarts(release) == restarts


@contextlib.contextmanager
def watching(namespace: str) -> Iterator[None]:
    """The operator watches this namespace, too."""
    with helm_python.Config(namespace=SYSTEM) as helm:
        values = helm.get_values(RELEASE)
        wider = {**values, "watchNamespaces": [*values["watchNamespaces"], namespace]}
        helm.upgrade(str(CHART), RELEASE, wider, wait="watcher", timeout=180)
        try:
            yield
        finally:
            helm.upgrade(str(CHART), RELEASE, values, wait="watcher", timeout=180)


def _restarts(release: Kubectl) -> int:
    statuses = (status for pod in release.get("pods")["items"] for status in pod["status"].get("containerStatuses", ()))
    return sum(status["restartCount"] for status in statuses)


@pytest.mark.long
def test_an_api_server_that_stops_for_a_minute_changes_nothing(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    """It accepts connections and answers nothing: the worst kind of absence."""
    servers = list(_api_servers(kubectl))
    if not servers:
        pytest.skip("the cluster's kube-apiserver is no process that is to be seen from here; this test stops it for a minute")
    name = "no-api"
    kubectl.apply(job(name, training=ENDLESS))
    before = trains(kubectl, name, 5)
    pods = uids(kubectl, name)
    try:
        for process in servers:
            process.send_signal(signal.SIGSTOP)
        time.sleep(AWAY_SECONDS)
    finally:
        for process in servers:
            process.send_signal(signal.SIGCONT)
    wait_until("the API server answers", lambda: _answers(kubectl), 120)
    trains(kubectl, name, before)
    assert uids(kubectl, name) == pods
    attempt = status_of(kubectl, name)["attempt"]
    assert (attempt["number"], attempt["failures"], attempt["preemptions"]) == (1, 0, 0)
    gone(kubectl, name)


def _api_servers(kubectl: Kubectl) -> Iterator[psutil.Process]:
    """The processes of this machine that serve the cluster's API at the port of the kubeconfig."""
    url = kubectl("config", "view", "--minify", "--output", "jsonpath={.clusters[0].cluster.server}")
    port = url.rstrip("/").rpartition(":")[2]
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "kube-apiserver" and any(word.endswith(port) for word in process.info["cmdline"]):
            yield process


def _answers(kubectl: Kubectl) -> bool:
    with contextlib.suppress(KubectlError):
        return bool(kubectl("get", "--raw", "/readyz"))
    return False


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_twenty_preemptions_in_a_row_leave_no_trace_in_the_weights(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    """All pods get SIGTERM twenty times. No step is lost but the one that was under way, and the weights are those of a calm run."""
    precise = {**LONG, "precision": "float32"}
    calm, name = "calm", "preempted"
    kubectl.apply(job(calm, training=precise))
    kubectl("wait", f"finetunejob/{calm}", "--for=condition=Complete", "--timeout=600s", timeout=620)
    kubectl.apply(job(name, training=precise))
    reached = 0
    for number in range(1, PREEMPTIONS + 1):
        reached = trains(kubectl, name, reached)
        kubectl("delete", "pods", "--selector", f"{LABEL_JOB_NAME}={name},{LABEL_JOB_UID}", "--wait=false")
        wait_until(f"attempt {number + 1}", lambda number=number: status_of(kubectl, name)["attempt"]["number"] > number, 180)  # type: ignore[misc]
    kubectl("wait", f"finetunejob/{name}", "--for=condition=Complete", "--timeout=600s", timeout=620)
    attempt = status_of(kubectl, name)["attempt"]
    assert (attempt.get("failures", 0), attempt["preemptions"], attempt["number"]) == (0, PREEMPTIONS, PREEMPTIONS + 1)
    assert attempt.get("lostSteps", 0) <= PREEMPTIONS
    sums = json.loads(kubectl.python(storage, _SUMS, *(f"/storage/out-{each}/adapter/adapter_model.safetensors" for each in (calm, name))))
    assert sums[0] == sums[1]
    for each in (calm, name):
        gone(kubectl, each)


_SUMS = """
import hashlib, json, pathlib, sys
print(json.dumps([hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() for path in sys.argv[1:]]))
"""
