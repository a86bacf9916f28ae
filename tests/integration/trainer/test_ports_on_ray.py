"""Every port on which the pods of a job listen while it trains, and what it does for somebody without the attempt's token."""

import os
import secrets
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from tests.integration.trainer.grpc_calls import OK, UNAUTHENTICATED, UNIMPLEMENTED, GrpcCaller, every_method, service_of
from tests.integration.trainer.harness import Pods, free_ports
from tests.tiny_llama import make_tiny_llama, write_questions

from finetune_operator.settings import Settings
from finetune_trainer.environment import Environment, scratch_folder
from finetune_trainer.ray_cluster import RayHead

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

PATIENCE = 600.0
Protocol = Literal["grpc", "http", "other"]

OPEN_METHODS = {
    "/grpc.health.v1.Health/Check": "a health path: says that the process serves",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "says which methods there are, as Ray's source does",
}
"""gRPC that needs no token."""
OPEN_PATHS = {"/healthz": "the kubelet's probe has no token", "/metrics": "Prometheus has no token; numbers of the job, no text of it"}
"""Of the report's server."""
OPEN_PORTS = {
    "torch": "the rendezvous and the rings of torch (TCPStore, gloo, NCCL) know no token: the NetworkPolicy lets in the job's own pods only"
}
"""Whole ports that ask for nothing. Of the training processes only."""
CLOSED_PATHS = {
    "report": (("GET", "/report"), ("PUT", "/progress")),
    "runtime environments": (
        ("POST", "/get_or_create_runtime_env"),
        ("POST", "/delete_runtime_env_if_possible"),
        ("POST", "/get_runtime_envs_info"),
        ("GET", "/"),
    ),
}
HARMLESS = {
    "global state": {"/ray.rpc.NodeInfoGcsService/GetClusterId"},
    "raylet": {"/ray.rpc.NodeManagerService/GetSystemConfig", "/ray.rpc.ObjectManagerService/Pull"},
    "ray process": {"/ray.rpc.CoreWorkerService/NumPendingTasks"},
}
"""A method of each service, to be called with the right token: it changes nothing."""
RAYLET_PORTS = 2
"""One serves the node, one its objects."""


@dataclass(frozen=True)
class Port:
    """Where a process listens."""

    owner: str
    """What the process is: report, global state, raylet, runtime environments, ray process, torch; else its command line."""
    protocol: Protocol
    address: tuple[str, int]
    pid: int


@dataclass(frozen=True)
class Watched:
    """A job that trains, its ports, and tokens."""

    pods: Pods
    ports: tuple[Port, ...]
    right: str
    bad: dict[str, str | None]


def spec(inputs: Path, output: Path) -> dict[str, Any]:
    """A training that goes on for as long as the test does."""
    return {
        "model": {"source": f"file://{inputs}/model"},
        "data": {name: {"source": f"file://{inputs}/{name}.jsonl"} for name in ("train", "validation")},
        "method": {"lora": {"rank": 4}},
        "training": {"epochs": 1000, "globalBatchSize": 12, "maxSequenceLength": 64, "packing": False, "precision": "float32"},
        "checkpoint": {"everySteps": 100_000},
        "compute": {"workers": {"min": 2, "max": 2}},
        "output": {"storage": f"file://{output}"},
    }


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    make_tiny_llama(folder / "model")
    write_questions(folder / "train.jsonl", 60)
    write_questions(folder / "validation.jsonl", 10, start=100)
    settings = Settings(token_key=b"the key of the operator")
    with Pods(folder / "pods", spec(folder, folder / "out"), token=settings.token("this-job", 1)) as pods:
        pods.patience = PATIENCE
        pods.start_head()
        assert pods.follow(lambda report: report.progress is not None and report.progress.step >= 1) is not None, pods.log()
        bad = {"none": None, "wrong": secrets.token_hex(32), "another job's": settings.token("another-job", 1)}
        yield Watched(pods, tuple(listeners(pods)), settings.token("this-job", 1), bad)


def listeners(pods: Pods) -> Iterator[Port]:
    """Every TCP port on which the head, the workers and all that they started listen."""
    assert pods.head is not None
    training = set(pods.training_processes())
    for process in processes(pods):
        found = {each.laddr.port: each.laddr.ip for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
        for port, address in found.items():
            place = ("127.0.0.1" if address in ("::", "0.0.0.0") else address, port)  # noqa: S104 - compared, not bound
            protocol = protocol_of(place)
            yield Port(owner_of(process, pods.head.pid, training, protocol), protocol, place, process.pid)


def processes(pods: Pods) -> list[psutil.Process]:
    """Every process in the pods."""
    assert pods.head is not None
    tops = [psutil.Process(root.pid) for root in (pods.head, *pods.workers)]
    return [process for top in tops for process in (top, *top.children(recursive=True))]


def owner_of(process: psutil.Process, head: int, training: set[int], protocol: Protocol) -> str:
    """What a process is, by what it is called; a head and a training process are Ray processes, too."""
    title = " ".join(process.cmdline())
    if process.pid in training and protocol == "other":
        return "torch"
    if process.pid == head and protocol == "http":
        return "report"
    if process.pid == head or process.pid in training:
        return "ray process"
    known = {"gcs_server": "global state", "raylet": "raylet"}.get(process.name())
    if known or title.startswith("ray::RuntimeEnvAgent"):
        return known or "runtime environments"
    return "ray process" if title.startswith("ray::") and "Agent" not in title else title


def protocol_of(address: tuple[str, int]) -> Protocol:
    """What is spoken there, by the first answer to HTTP/2's greeting: gRPC greets back, HTTP/1 finds it a bad request."""
    with socket.create_connection(address, timeout=5.0) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        try:
            answer = connection.recv(9)
        except (TimeoutError, ConnectionResetError):
            return "other"
    if answer.startswith(b"HTTP/1"):
        return "http"
    return "grpc" if answer[3:4] == b"\x04" else "other"


def http_status(port: Port, verb: str, path: str, token: str | None) -> int:
    """The status of an empty request."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    address, body = f"http://{port.address[0]}:{port.address[1]}{path}", None if verb == "GET" else b""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers, method=verb), timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def of(watched: Watched, protocol: Protocol) -> list[Port]:
    return [port for port in watched.ports if port.protocol == protocol]


def test_the_ports_are_those_that_are_known(watched: Watched) -> None:
    """Any other is a new one, of a new version of Ray or torch, that is to be looked at."""
    counted = {(port.owner, port.protocol): 0 for port in watched.ports}
    for port in watched.ports:
        counted[port.owner, port.protocol] += 1
    nodes = 3
    assert counted.pop(("report", "http")) == 1
    assert counted.pop(("global state", "grpc")) == 1
    assert counted.pop(("raylet", "grpc")) == RAYLET_PORTS * nodes
    assert counted.pop(("runtime environments", "http")) == nodes
    assert counted.pop(("ray process", "grpc")) >= nodes, "the driver and the training processes, at least"
    assert counted.pop(("torch", "other")) >= nodes - 1
    assert not counted, "ports that nobody knows"
    assert {port.owner for port in of(watched, "other")} == set(OPEN_PORTS)


def test_no_method_of_ray_answers_without_the_token(watched: Watched) -> None:
    methods = every_method()
    assert len(methods) > 100
    for port in of(watched, "grpc"):
        with GrpcCaller(port.address) as caller:
            answered = {method for method in HARMLESS[port.owner] if caller.call(method, watched.right) == OK}
            assert len(answered) == 1, f"{port}: the right token opens {answered}"
            services = {service_of(method) for method in answered}
            for who, token in watched.bad.items():
                statuses = {method: caller.call(method, token) for method in methods}
                assert {method for method, status in statuses.items() if status == OK} <= OPEN_METHODS.keys(), f"{port}, {who}"
                closed = {method: status for method, status in statuses.items() if method not in OPEN_METHODS}
                assert set(closed.values()) <= {UNAUTHENTICATED, UNIMPLEMENTED}, f"{port}, {who}: {closed}"
                assert {closed[method] for method in methods if service_of(method) in services} == {UNAUTHENTICATED}, f"{port}, {who}"


def test_both_ports_of_a_raylet_were_asked_what_they_serve(watched: Watched) -> None:
    for pid in {port.pid for port in watched.ports if port.owner == "raylet"}:
        opened = set()
        for port in (each for each in watched.ports if each.pid == pid):
            with GrpcCaller(port.address) as caller:
                opened |= {method for method in HARMLESS["raylet"] if caller.call(method, watched.right) == OK}
        assert opened == HARMLESS["raylet"]


def test_no_http_path_answers_without_the_token(watched: Watched) -> None:
    for port in of(watched, "http"):
        for verb, path in CLOSED_PATHS[port.owner]:
            for who, token in watched.bad.items():
                assert http_status(port, verb, path, token) in (401, 403), f"{port} {path}, {who}"
    report = next(port for port in watched.ports if port.owner == "report")
    assert http_status(report, "GET", "/report", watched.right) == 200
    assert http_status(report, "PUT", "/progress", watched.right) == 400, "heard, and found empty"
    for port in (port for port in watched.ports if port.owner == "runtime environments"):
        assert http_status(port, "POST", "/get_runtime_envs_info", watched.right) == 200


def test_the_report_serves_no_more_than_its_health_and_its_numbers(watched: Watched) -> None:
    report = next(port for port in watched.ports if port.owner == "report")
    assert {path: http_status(report, "GET", path, None) for path in OPEN_PATHS} == dict.fromkeys(OPEN_PATHS, 200)
    others = ("/", "/api/jobs/", "/api/version", "/logs", "/report/", "/metrics/x", "/progress", "/static/")
    assert {http_status(report, "GET", path, None) for path in others} <= {404, 405}


def test_the_token_is_in_its_file_alone(watched: Watched) -> None:
    """In no process's arguments or environment, which whoever sees the node's processes may read, in no log of Ray's, in no artifact."""
    pods, token = watched.pods, watched.right
    running = processes(pods)
    assert len(running) > 10
    assert any(str(pods.folder / "token") in process.environ().values() for process in running), "they know the file"
    for process in running:
        assert token not in " ".join(process.cmdline())
        assert token not in " ".join(process.environ().values())
    scratch = scratch_folder(pods.uid, 1)
    files = [path for folder in (scratch, pods.folder.parent) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("gcs_server") for path in files), "Ray's logs are among them"
    holders = {path for path in files if token.encode() in path.read_bytes()}
    assert holders == {pods.folder / "token"}
    assert token not in pods.read("/metrics") + str(pods.read_report())


def test_none_of_it_disturbed_the_training(watched: Watched) -> None:
    """Among the calls are those that would stop a raylet, kill an actor or end the job."""
    seen = watched.pods.read_report()
    assert seen is not None
    assert seen.progress is not None
    step = seen.progress.step
    later = watched.pods.follow(lambda report: report.progress is not None and report.progress.step > step)
    assert later is not None, watched.pods.log()
    assert later.lost_steps == 0
    assert later.progress is not None
    assert later.progress.step > step


def test_what_the_threat_model_says_is_left_is_left(tmp_path: Path) -> None:
    """One call without a token that Ray 2.60 does not survive.

    Where this fails Ray has mended it: take the sentence out of docs/security.md.
    """
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    port, report_port = free_ports(2)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FINETUNE_"))}
    environment = Environment(tmp_path / "job", 1, token, "127.0.0.1", port, report_port, tmp_path, local=True, variables=variables)
    head = RayHead(environment, scratch_folder(secrets.token_hex(4), 1))
    try:
        head.wait_ready()
        with GrpcCaller(("127.0.0.1", port)) as caller:
            assert caller.call("/ray.rpc.syncer.RaySyncer/StartSync", None) == UNAUTHENTICATED
            with pytest.raises(ConnectionError):
                caller.call("/ray.rpc.syncer.RaySyncer/StartSync", None, node=None)
        time.sleep(1.0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5.0)
    finally:
        head.stop()
