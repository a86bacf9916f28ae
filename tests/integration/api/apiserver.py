"""A real API server for the tests: the binaries that KUBEBUILDER_ASSETS names, in a folder of their own, or the cluster of KUBECONFIG."""

import contextlib
import os
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

STARTUP_SECONDS = 240
ADMIN_TOKEN = "admin-token-of-the-tests"
OPERATOR_TOKEN = "operator-token-of-the-tests"
OPERATOR_USER = "finetune-operator-under-test"


@dataclass(frozen=True)
class ApiServer:
    """Where the API server is, and how the tests and the operator log in."""

    url: str
    admin_kubeconfig: Path
    """Everything is allowed: for the tests."""
    operator_kubeconfig: Path
    """Only what the operator's rules allow, where the server is the tests' own; else the same as the admin's."""
    operator_user: str | None
    """Name that the rules are bound to; None where the operator runs as the admin."""
    collects_garbage: bool
    """Whether a controller manager deletes what an owner leaves behind, and makes service accounts."""
    audit_log: Path | None = None
    """What the operator asked for, as the server itself has written it down; None where the server is not the tests' own."""


class NoApiServerError(Exception):
    """There is no API server to test with. The message says why and what would give one."""


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[ApiServer]:
    """An own server from KUBEBUILDER_ASSETS, since it is empty and nothing else acts in it; else the cluster that KUBECONFIG names.

    Raises NoApiServerError.
    """
    assets = Path(os.environ.get("KUBEBUILDER_ASSETS", ""))
    if (assets / "kube-apiserver").is_file() and (assets / "etcd").is_file():
        with _own_server(assets, folder) as server:
            yield server
    elif os.environ.get("KUBECONFIG"):
        yield _given_server(Path(os.environ["KUBECONFIG"]))
    else:
        raise NoApiServerError("no API server: set KUBEBUILDER_ASSETS to a folder with etcd and kube-apiserver, or KUBECONFIG to a cluster")


def _given_server(kubeconfig: Path) -> ApiServer:
    config = yaml.safe_load(kubeconfig.read_text())
    context = next(c["context"] for c in config["contexts"] if c["name"] == config["current-context"])
    cluster = next(c["cluster"] for c in config["clusters"] if c["name"] == context["cluster"])
    return ApiServer(cluster["server"], kubeconfig, kubeconfig, operator_user=None, collects_garbage=True)


@contextlib.contextmanager
def _own_server(assets: Path, folder: Path) -> Iterator[ApiServer]:
    folder.mkdir(parents=True, exist_ok=True)
    etcd_port, peer_port, port = free_port(), free_port(), free_port()
    url = f"https://127.0.0.1:{port}"
    manager = assets / "kube-controller-manager"
    admin = _kubeconfig(folder / "admin.yaml", url, ADMIN_TOKEN)
    operator = _kubeconfig(folder / "operator.yaml", url, OPERATOR_TOKEN)
    (folder / "tokens.csv").write_text(f'{ADMIN_TOKEN},admin,1,"system:masters"\n{OPERATOR_TOKEN},{OPERATOR_USER},2\n')
    watched = {"level": "Metadata", "users": [OPERATOR_USER], "omitStages": ["RequestReceived"]}
    policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [watched, {"level": "None"}]}
    (folder / "audit-policy.yaml").write_text(yaml.safe_dump(policy))
    key = folder / "service-accounts.key"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)

    with contextlib.ExitStack() as processes:

        def start(*command: str | Path) -> None:
            processes.enter_context(_process(folder / f"{Path(command[0]).name}.log", [str(part) for part in command]))

        start(
            *(assets / "etcd", "--data-dir", folder / "etcd", "--unsafe-no-fsync", "--log-level", "error"),
            *("--listen-client-urls", f"http://127.0.0.1:{etcd_port}", "--advertise-client-urls", f"http://127.0.0.1:{etcd_port}"),
            *("--listen-peer-urls", f"http://127.0.0.1:{peer_port}"),
        )
        start(
            *(assets / "kube-apiserver", "--etcd-servers", f"http://127.0.0.1:{etcd_port}", "--cert-dir", folder / "certs"),
            *("--bind-address", "127.0.0.1", "--secure-port", str(port), "--service-cluster-ip-range", "10.96.0.0/16"),
            *("--token-auth-file", folder / "tokens.csv", "--authorization-mode", "RBAC", "--allow-privileged"),
            *("--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", key),
            *("--service-account-signing-key-file", key),
            *("--audit-policy-file", folder / "audit-policy.yaml", "--audit-log-path", folder / "audit.log"),
            *([] if manager.is_file() else ["--disable-admission-plugins", "ServiceAccount"]),
        )
        _wait_until_ready(url, folder)
        if manager.is_file():
            # Only what the tests look at: the full set costs a core at start.
            controllers = "garbagecollector,namespace,serviceaccount"
            start(
                *(manager, "--kubeconfig", admin, "--leader-elect=false", "--controllers", controllers),
                *("--concurrent-gc-syncs", "4", "--secure-port", str(free_port()), "--cert-dir", folder / "manager-certs"),
                *_without_insecure_port(manager),
            )
        yield ApiServer(url, admin, operator, OPERATOR_USER, collects_garbage=manager.is_file(), audit_log=folder / "audit.log")


def _without_insecure_port(manager: Path) -> list[str]:
    """Releases before 1.24 also open a fixed port, which another cluster on the machine may hold; later ones do not know the flag."""
    words = subprocess.run([manager, "--version"], check=True, capture_output=True, text=True).stdout
    minor = int(words.split("v1.")[1].split(".")[0])
    return ["--port", "0"] if minor < 24 else []


@contextlib.contextmanager
def _process(log: Path, command: list[str]) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield
    finally:
        process.kill()  # nothing in it is kept
        process.wait()


def _kubeconfig(path: Path, url: str, token: str) -> Path:
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "tests", "cluster": {"server": url, "insecure-skip-tls-verify": True}}],
                "users": [{"name": "user", "user": {"token": token}}],
                "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "user"}}],
                "current-context": "tests",
            }
        )
    )
    return path


def kubeconfig_through(path: Path, server_url: str, original: Path) -> Path:
    """A copy of a kubeconfig that reaches the server at another address, as through a proxy."""
    config = yaml.safe_load(original.read_text())
    for entry in config["clusters"]:
        entry["cluster"] = {"server": server_url}
    path.write_text(yaml.safe_dump(config))
    return path


def _wait_until_ready(url: str, folder: Path) -> None:
    context = ssl._create_unverified_context()  # noqa: S323 - the server's own throw-away certificate
    request = urllib.request.Request(f"{url}/readyz", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})  # noqa: S310 - the test's own address
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5, context=context):  # noqa: S310
                return
        except (OSError, urllib.error.URLError) as error:
            if time.monotonic() > deadline:
                words = (folder / "kube-apiserver.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"kube-apiserver did not become ready in {STARTUP_SECONDS} s: {error}\n{words}") from error
            time.sleep(0.2)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
