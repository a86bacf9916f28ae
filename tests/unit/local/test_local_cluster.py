"""The port of the loop on this machine, call by call."""

import asyncio
import json
import os

import pytest

from finetune_api.status import Status
from finetune_operator.local.cluster import LocalCluster, Machine, data_of
from finetune_operator.local.state import JobFile, State
from finetune_operator.observed import observe
from finetune_operator.plan import secret_name
from finetune_operator.port import Conflict, JobKey

KEY = JobKey("default", "demo")


@pytest.fixture
def state(tmp_path):
    state = State(tmp_path / "state")
    state.prepare()
    return state


@pytest.fixture
def job_file(tmp_path):
    file = JobFile(tmp_path / "demo.status.yaml")
    meta = {"name": "demo", "namespace": "default", "uid": "u-1", "generation": 1, "labels": {}}
    file.save({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": meta, "spec": {"suspend": False}})
    return file


@pytest.fixture
async def cluster(state, job_file):
    cluster = LocalCluster(state, job_file, lambda job: job, Machine(gpus=("0", "1", "2"), env=dict(os.environ)))
    yield cluster
    await cluster.end_now()


def manifest(name="demo-1-worker-0", command=("sleep", "600"), gpus=0, grace=30):
    labels = {"finetune.dev/job-name": "demo", "finetune.dev/job-uid": "u-1", "finetune.dev/attempt": "1", "finetune.dev/role": "worker"}
    resources = {"limits": {"nvidia.com/gpu": gpus}} if gpus else {}
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": labels, "ownerReferences": [{"uid": "u-1"}]},
        "spec": {
            "terminationGracePeriodSeconds": grace,
            "containers": [{"name": "worker", "command": list(command), "env": [], "resources": resources}],
        },
    }


async def seen(cluster):
    raw = await cluster.read(KEY)
    return {pod.name: pod for pod in observe("demo", "u-1", raw.pods, raw.config_maps, raw.events).pods}


async def until(cluster, condition):
    """Look again whenever a process has ended."""
    while not condition(pods := await seen(cluster)):
        await asyncio.wait_for(cluster.changed.wait(), 20)
        cluster.changed.clear()
    return pods


async def test_a_pod_runs_and_its_end_is_told(cluster, state):
    await cluster.apply(manifest(command=("sh", "-c", "echo hello; exit 3")))
    pod = (await until(cluster, lambda pods: pods["demo-1-worker-0"].finished))["demo-1-worker-0"]
    assert pod.exit is not None
    assert (pod.phase, pod.exit.code, pod.exit.message) == ("Failed", 3, "hello\n")
    assert state.log("demo-1-worker-0").read_text() == "hello\n"


async def test_a_program_that_cannot_be_started_is_a_pod_that_failed(cluster):
    await cluster.apply(manifest(command=("/absent/program",)))
    pod = (await seen(cluster))["demo-1-worker-0"]
    assert pod.exit is not None
    assert pod.exit.code == 127
    assert "/absent/program" in pod.exit.message


async def test_applying_twice_starts_one_process(cluster, state):
    await cluster.apply(manifest())
    first = json.loads((state.pod("demo-1-worker-0") / "process.json").read_text())
    await cluster.apply(manifest())
    assert json.loads((state.pod("demo-1-worker-0") / "process.json").read_text()) == first


async def test_a_deleted_pod_is_going_and_then_gone(cluster):
    await cluster.apply(manifest())
    pod = (await seen(cluster))["demo-1-worker-0"]
    await cluster.delete("Pod", "default", "demo-1-worker-0", uid="another")
    assert (await seen(cluster))["demo-1-worker-0"].deletion is None
    await cluster.delete("Pod", "default", "demo-1-worker-0", uid=pod.uid)
    assert await until(cluster, lambda pods: not pods) == {}
    await cluster.delete("Pod", "default", "demo-1-worker-0")


async def test_a_pod_that_does_not_listen_is_killed_after_its_grace(cluster, state):
    ready = state.root / "ready"
    await cluster.apply(manifest(command=("sh", "-c", f"trap '' TERM; touch '{ready}'; while true; do sleep 0.1; done"), grace=1))
    for _ in range(400):
        if ready.exists():
            break
        await asyncio.sleep(0.05)
    await cluster.delete("Pod", "default", "demo-1-worker-0")
    assert (await seen(cluster))["demo-1-worker-0"].deletion is not None
    assert await until(cluster, lambda pods: not pods) == {}


async def test_pods_are_deleted_by_their_labels(cluster):
    for name in ("demo-1-worker-0", "demo-1-worker-1"):
        await cluster.apply(manifest(name))
    labels = manifest()["metadata"]["labels"]
    await cluster.delete_pods("default", {**labels, "finetune.dev/attempt": "2"}, grace=0)
    assert [pod.deletion for pod in (await seen(cluster)).values()] == [None, None]
    await cluster.delete_pods("default", labels, grace=0)
    assert await until(cluster, lambda pods: not pods) == {}


async def test_each_worker_sees_the_gpus_that_it_asked_for_and_gives_them_back(cluster, state):
    names = [f"demo-1-worker-{index}" for index in range(3)]
    show = ("sh", "-c", 'echo "<$CUDA_VISIBLE_DEVICES>"; sleep 600')
    for name, gpus in zip(names, (2, 1, 0), strict=True):
        await cluster.apply(manifest(name, show, gpus))
    for name, expected in zip(names, ("<0,1>\n", "<2>\n", "<>\n"), strict=True):
        for _ in range(400):
            if state.log(name).read_text():
                break
            await asyncio.sleep(0.05)
        assert state.log(name).read_text() == expected
    await cluster.delete("Pod", "default", names[0], grace=0)
    await until(cluster, lambda pods: names[0] not in pods)
    state.log(names[0]).unlink()
    await cluster.apply(manifest(names[0], ("sh", "-c", 'echo "<$CUDA_VISIBLE_DEVICES>"'), 1))
    await until(cluster, lambda pods: pods[names[0]].finished)
    assert state.log(names[0]).read_text() == "<0>\n"


async def test_a_status_is_written_against_the_version_that_was_read(cluster, job_file):
    raw = await cluster.read(KEY)
    now = await cluster.patch_status(raw.job, Status(phase="Pending"))
    assert now["metadata"]["resourceVersion"] != raw.job["metadata"]["resourceVersion"]
    with pytest.raises(Conflict):
        await cluster.patch_status(raw.job, Status(phase="Failed"))
    job_file.remove()
    with pytest.raises(Conflict):
        await cluster.patch_status(now, Status(phase="Failed"))
    assert await cluster.read(KEY) is None


async def test_suspending_is_a_change_of_the_spec_and_happens_once(cluster, job_file):
    cluster.suspend()
    cluster.suspend()
    job = job_file.load()
    assert (job["spec"]["suspend"], job["metadata"]["generation"]) == (True, 2)


async def test_an_attempts_objects_come_and_go(cluster, state):
    meta = manifest()["metadata"] | {"name": "demo-1"}
    await cluster.apply({"kind": "ConfigMap", "metadata": meta, "data": {"job.json": "{}"}})
    secret = secret_name("demo", "u-1", 1)
    await cluster.apply({"kind": "Secret", "metadata": {**meta, "name": secret}, "stringData": {"token": "s"}})
    await cluster.apply({"kind": "Service", "metadata": meta})
    raw = await cluster.read(KEY)
    assert observe("demo", "u-1", raw.pods, raw.config_maps, raw.events).anchors == {1}
    assert (state.secret(secret) / "token").stat().st_mode & 0o077 == 0
    for _ in range(2):
        await cluster.delete("ConfigMap", "default", "demo-1")
    assert (await cluster.read(KEY)).config_maps == []
    assert list((state.root / "secrets").iterdir()) == []


async def test_another_jobs_objects_are_not_seen(cluster):
    other = manifest()
    other["metadata"]["labels"]["finetune.dev/job-uid"] = "u-2"
    await cluster.apply(other)
    assert await seen(cluster) == {}
    assert await cluster.read(JobKey("default", "other")) is None
    assert await cluster.read(JobKey("other", "demo")) is None


def test_a_log_ends_with_whole_lines(state, job_file):
    cluster = LocalCluster(state, job_file, lambda job: job, Machine())
    state.log("p").write_text("first line\nsecond\nthird\n")
    assert cluster.log_tail("p", 15) == "second\nthird\n"
    assert cluster.log_tail("p") == "first line\nsecond\nthird\n"
    assert cluster.log_tail("absent") == ""


def test_data_is_read_as_the_api_server_reads_it():
    assert data_of({"kind": "ConfigMap", "data": {"a": "x"}, "binaryData": {"b": "AAE="}}) == {"a": b"x", "b": b"\x00\x01"}
    assert data_of({"kind": "Secret", "data": {"a": "eA==", "b": "eQ=="}, "stringData": {"b": "z"}}) == {"a": b"x", "b": b"z"}
    with pytest.raises(ValueError, match="base64"):
        data_of({"kind": "Secret", "data": {"a": "%"}})
