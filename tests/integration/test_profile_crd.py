"""The TuningProfile's definition on a real API server that knows CEL: it judges and stores as the models do. See test_crd.py."""

import os
import ssl
import time
from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.integration.crd_server import Server

from finetune_api.profile import parse_profile
from finetune_api.profile_crd import profile_definition
from finetune_operator.manifest import read_manifests

pytestmark = pytest.mark.api

CORPUS = Path(__file__).parents[2] / "tests/data/profiles"
FILES = sorted(CORPUS.glob("*/*.yaml"))
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
DEFINITION = f"{DEFINITIONS}/tuningprofiles.finetune.dev"
PROFILES = "/apis/finetune.dev/v1alpha1/tuningprofiles"
READY_SECONDS = 60


@pytest.fixture(scope="module")
def server():
    """The server for tests, with the definition as the models have it now."""
    url = os.environ.get("FINETUNE_CRD_API")
    if not url:
        pytest.skip("no API server with CEL for tests: set FINETUNE_CRD_API (and FINETUNE_CRD_TOKEN)")
    found = Server(url, ssl._create_unverified_context(), os.environ.get("FINETUNE_CRD_TOKEN"))  # noqa: S323 - a server for tests
    found.call("DELETE", DEFINITION)
    wait(lambda: found.call("GET", DEFINITION).code == 404)
    created = found.call("POST", DEFINITIONS, profile_definition())
    assert created.code == 201, created.message
    wait(lambda: found.call("GET", PROFILES).code == 200)
    yield found
    found.call("DELETE", DEFINITION)


def wait(condition):
    """Wait until it holds."""
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def verdict(server, text):
    """What the server says to a manifest, of which it keeps nothing."""
    return server.call("POST", f"{PROFILES}?dryRun=All&fieldValidation=Strict", text, kind="application/yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_server_and_models_give_the_same_verdict(server, path):
    text = path.read_text(encoding="utf-8")
    answer = verdict(server, text)
    assert (answer.code == 201) == (path.parent.name == "good"), answer.message
    if answer.code == 201:
        ours = parse_profile(read_manifests(text)[0]).spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        assert answer.body["spec"] == ours
    else:
        with pytest.raises(ValidationError):
            parse_profile(read_manifests(text)[0])


def test_the_columns(server):
    text = (CORPUS / "good/everything.yaml").read_text(encoding="utf-8")
    assert server.call("POST", PROFILES, text, kind="application/yaml").code == 201
    table = server.call("GET", f"{PROFILES}/everything", accept="application/json;as=Table;v=v1;g=meta.k8s.io").body
    cells = dict(zip([column["name"] for column in table["columnDefinitions"]], table["rows"][0]["cells"], strict=True))
    del cells["Age"]
    assert cells == {
        "Name": "everything",
        "Default": "true",
        "Workers": 4,
        "GPUs": 8,
        "Seconds": 86400,
        "Description": "One H100, for up to a day.",
        "Image": "registry.example.com/finetune-trainer@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    }


def test_a_profile_may_change(server):
    changed = server.call("PATCH", f"{PROFILES}/everything", {"spec": {"limits": {"gpus": 4}}}, kind="application/merge-patch+json")
    assert changed.code == 200, changed.message
    assert changed.body["metadata"]["generation"] == 2
