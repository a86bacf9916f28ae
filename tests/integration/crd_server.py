"""The API server that the CustomResourceDefinition is tried on.

FINETUNE_CRD_API=https://host:port and FINETUNE_CRD_TOKEN name a server for tests, whose FineTuneJobs are deleted. Without them the cluster
of KUBECONFIG is asked, if it is new enough and holds no other version of the CRD.
"""

import json
import os
import re
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.crd import custom_resource_definition

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
DEFINITION = f"{DEFINITIONS}/finetunejobs.finetune.dev"
JOBS = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs"
OLDEST_WITH_CEL = 29
READY_SECONDS = 60


@dataclass(frozen=True)
class Answer:
    """An HTTP status and the JSON object that came with it."""

    code: int
    body: dict[str, Any]

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


@dataclass(frozen=True)
class Server:
    """An API server, by its address and what logs in there."""

    url: str
    tls: ssl.SSLContext
    token: str | None = None

    def call(
        self, method: str, path: str, content: object = None, kind: str = "application/json", accept: str = "application/json"
    ) -> Answer:
        """One request; `content` is text or an object that becomes JSON."""
        data = None if content is None else (content if isinstance(content, str) else json.dumps(content)).encode()
        headers = {"Accept": accept, "Content-Type": kind} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)  # noqa: S310 - the test's own address
        try:
            with urllib.request.urlopen(request, timeout=30, context=self.tls) as response:  # noqa: S310
                return Answer(response.status, json.load(response))
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            return Answer(error.code, json.loads(text) if text.startswith("{") else {"message": text})

    def verdict(self, text: str) -> Answer:
        """What the server says to a manifest in YAML or JSON, of which it keeps nothing."""
        return self.call("POST", f"{JOBS}?dryRun=All&fieldValidation=Strict", text, kind="application/yaml")

    def minor(self) -> int:
        return int(re.sub(r"\D", "", str(self.call("GET", "/version").body.get("minor", "0"))))


def _kubeconfig_server(path: Path) -> Server:
    """The current context's server, with its token or client certificate."""
    config = yaml.safe_load(path.read_text())
    context = next(entry["context"] for entry in config["contexts"] if entry["name"] == config["current-context"])
    cluster = next(entry["cluster"] for entry in config["clusters"] if entry["name"] == context["cluster"])
    user = next(entry["user"] for entry in config["users"] if entry["name"] == context["user"])
    authority = cluster.get("certificate-authority-data")
    tls = ssl.create_default_context(
        cafile=cluster.get("certificate-authority"), cadata=b64decode(authority).decode() if authority else None
    )
    if cluster.get("insecure-skip-tls-verify"):
        tls = ssl._create_unverified_context()  # noqa: S323 - as the kubeconfig says
    if "client-certificate-data" in user:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("client-certificate", "client-key"):
                (Path(folder) / name).write_bytes(b64decode(user[f"{name}-data"]))
            tls.load_cert_chain(Path(folder) / "client-certificate", Path(folder) / "client-key")
    elif "client-certificate" in user:
        tls.load_cert_chain(user["client-certificate"], user["client-key"])
    return Server(cluster["server"], tls, user.get("token"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with the CRD as the models have it now."""
    own = os.environ.get("FINETUNE_CRD_API")
    if own:
        found = Server(own, ssl._create_unverified_context(), os.environ.get("FINETUNE_CRD_TOKEN"))  # noqa: S323 - a server for tests
    elif os.environ.get("KUBECONFIG"):
        found = _kubeconfig_server(Path(os.environ["KUBECONFIG"]))
        if found.minor() < OLDEST_WITH_CEL:
            pytest.skip(f"the cluster of KUBECONFIG is 1.{found.minor()} and knows no CEL: name a newer one, or set FINETUNE_CRD_API")
    else:
        pytest.skip("no API server with CEL: set FINETUNE_CRD_API (and FINETUNE_CRD_TOKEN), or KUBECONFIG to a cluster of 1.29 or later")
    made = _install(found, replace=bool(own))
    yield found
    if made:
        found.call("DELETE", DEFINITION)


def _install(server: Server, *, replace: bool) -> bool:
    """Install the CRD; whether it was not there before."""
    definition = custom_resource_definition()
    present = server.call("GET", DEFINITION)
    if present.code == 200 and not replace:
        if present.body["spec"]["versions"] != definition["spec"]["versions"]:
            pytest.skip("the cluster of KUBECONFIG holds another version of the CRD, which this test does not replace")
        return False
    if present.code == 200:
        server.call("DELETE", DEFINITION)
        _until(lambda: server.call("GET", DEFINITION).code == 404, "the old CRD to go")
    created = server.call("POST", DEFINITIONS, definition)
    assert created.code == 201, created.message
    _until(lambda: _established(server), "the definition to be established")
    _until(lambda: server.call("GET", JOBS).code == 200, "the jobs to be served")
    return True


def _established(server: Server) -> bool:
    """Whether this definition is served, and not still the one that it replaces."""
    conditions = server.call("GET", DEFINITION).body.get("status", {}).get("conditions")
    return any(entry["type"] == "Established" and entry["status"] == "True" for entry in conditions or ())


def _until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {READY_SECONDS} s for {what}"
        time.sleep(0.1)
