"""The CustomResourceDefinition on a real API server that knows CEL (Kubernetes 1.29 or later); `crd_server` says which."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.integration.crd_server import DEFINITION, JOBS, Answer, Server, server

from finetune_api.v1alpha1 import parse_job
from finetune_operator.manifest import ManifestError, read_manifests

__all__ = ["server"]
pytestmark = pytest.mark.api

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests/data/jobs"
FILES = sorted(CORPUS.glob("*/*.yaml"))
GOOD = sorted(CORPUS.glob("good/*.yaml"))


@pytest.fixture
def job(server: Server) -> Iterator[dict[str, Any]]:
    """A job in the server, as it is stored; deleted afterwards."""
    manifest = read_manifests((CORPUS / "good/minimal.yaml").read_text())[0]
    content = {**manifest, "metadata": {"name": f"test-{uuid.uuid4().hex[:8]}"}}
    content["spec"] = {**manifest["spec"], "activeDeadlineSeconds": 3600, "maxGpuHours": 10}
    created = server.call("POST", JOBS, content)
    assert created.code == 201, created.message
    yield created.body
    server.call("DELETE", f"{JOBS}/{created.body['metadata']['name']}")


def test_the_server_takes_the_definition_and_serves_it(server):
    conditions = {entry["type"]: entry for entry in server.call("GET", DEFINITION).body["status"]["conditions"]}
    assert conditions["Established"]["status"] == "True"
    assert "NonStructuralSchema" not in conditions


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_server_and_models_give_the_same_verdict(server, path):
    text = path.read_text(encoding="utf-8")
    try:
        parse_job(read_manifests(text)[0])
        accepted = True
    except (ManifestError, ValidationError):
        accepted = False
    answer = server.verdict(text)
    assert (answer.code == 201) == accepted, answer.message
    assert accepted == (path.parent.name == "good")
    place = text.removeprefix("# ").split(":")[0]
    if not accepted and place.startswith("spec."):
        assert place in answer.message


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_the_server_stores_what_the_models_say(server, path):
    text = path.read_text(encoding="utf-8")
    ours = parse_job(read_manifests(text)[0]).spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert server.verdict(text).body["spec"] == ours


def test_what_the_server_stores_is_the_same_job_to_the_models(server, job):
    manifest = {**job, "metadata": {**job["metadata"]}}
    assert parse_job(manifest).spec.model_dump(mode="json", by_alias=True, exclude_none=True) == job["spec"]


@pytest.mark.parametrize(
    "training",
    [{"epochs": 3.0}, {"epochs": 3.5}, {"microBatchSize": 4.0}, {"microBatchSize": None}, {"learningrate": None}, {"learningRate": 10**30}],
    ids=json.dumps,
)
def test_json_is_judged_alike_too(server, training):
    manifest = read_manifests((CORPUS / "good/minimal.yaml").read_text())[0]
    content = {**manifest, "spec": {**manifest["spec"], "training": training}}
    answer = server.verdict(json.dumps(content))
    try:
        ours = parse_job(content).spec.training.model_dump(mode="json", by_alias=True, exclude_none=True)
    except ValidationError:
        assert answer.code in (400, 422), answer.message
    else:
        assert answer.body["spec"]["training"] == ours


def test_a_new_job_says_that_nobody_has_looked_at_it(server, job):
    stored = server.call("GET", f"{JOBS}/{job['metadata']['name']}").body
    assert stored["status"] == {"observedGeneration": -1}


ALLOWED = [
    {"suspend": True},
    {"ttlSecondsAfterFinished": 60},
    {"activeDeadlineSeconds": 7200},
    {"activeDeadlineSeconds": None},
    {"maxGpuHours": 10.5},
    {"maxGpuHours": None},
    {"preRunningDeadlineSeconds": 3600},
    {"progressDeadlineSeconds": 3600},
]
REFUSED = [
    ({"model": {"source": "hf://other/model"}}, "model is immutable"),
    ({"model": {"revision": "main"}}, "model is immutable"),
    ({"data": {"test": {"source": "pvc://a/test.jsonl"}}}, "data is immutable"),
    ({"method": {"lora": {"rank": 8}}}, "method is immutable"),
    ({"model": {"quantization": "nf4"}}, "model is immutable"),
    ({"method": {"lora": None, "ia3": {}}}, "method is immutable"),
    ({"objective": {"sft": {"lossOn": "all"}}}, "objective is immutable"),
    ({"objective": {"sft": None, "dpo": {}}}, "objective is immutable"),
    ({"training": {"epochs": 5}}, "training is immutable"),
    ({"training": {"earlyStopping": {"patience": 2}}}, "training is immutable"),
    ({"checkpoint": {"keep": 5}}, "checkpoint is immutable"),
    ({"compute": {"workers": {"max": 2}}}, "compute is immutable"),
    ({"compute": {"strategy": "fsdp"}}, "compute is immutable"),
    ({"output": {"storage": "pvc://elsewhere"}}, "output is immutable"),
    ({"evaluation": {"confidence": 0.9}}, "evaluation is immutable"),
    ({"search": {"parameters": {"method.lora.rank": {"choice": [8, 16]}}}}, "search is immutable"),
    ({"output": {"artifacts": ["adapter"]}}, "output is immutable"),
    ({"backoffLimit": 4}, "backoffLimit is immutable"),
    ({"maxGpuHours": 9.5}, "maxGpuHours can only be raised or removed"),
    ({"planOnly": True}, "planOnly is immutable"),
    ({"activeDeadlineSeconds": 1800}, "activeDeadlineSeconds can only be raised or removed"),
    ({"preRunningDeadlineSeconds": 900}, "preRunningDeadlineSeconds can only be raised"),
    ({"progressDeadlineSeconds": 900}, "progressDeadlineSeconds can only be raised"),
]


def _change(server: Server, job: dict[str, Any], spec: dict[str, Any]) -> Answer:
    return server.call("PATCH", f"{JOBS}/{job['metadata']['name']}", {"spec": spec}, kind="application/merge-patch+json")


@pytest.mark.parametrize("spec", ALLOWED, ids=json.dumps)
def test_what_steers_a_run_can_be_changed(server, job, spec):
    answer = _change(server, job, spec)
    assert answer.code == 200, answer.message
    (name, value) = next(iter(spec.items()))
    assert answer.body["spec"].get(name) == value


@pytest.mark.parametrize(("spec", "words"), REFUSED, ids=[json.dumps(spec) for spec, _ in REFUSED])
def test_what_a_run_follows_from_cannot_be_changed(server, job, spec, words):
    answer = _change(server, job, spec)
    assert answer.code == 422
    assert words in answer.message


def test_monitoring_can_be_added_changed_and_removed(server):
    manifest = read_manifests((CORPUS / "good/monitoring.yaml").read_text())[0]
    plan = manifest["spec"].pop("monitoring")
    manifest["metadata"] = {"name": f"test-{uuid.uuid4().hex[:8]}"}
    created = server.call("POST", JOBS, manifest)
    assert created.code == 201, created.message
    try:
        assert _change(server, created.body, {"monitoring": plan}).body["spec"]["monitoring"] == {**plan, "degradedIf": []}
        assert (
            _change(server, created.body, {"monitoring": {"schedule": "30 4 * * 0"}}).body["spec"]["monitoring"]["schedule"] == "30 4 * * 0"
        )
        assert "a range must begin" in _change(server, created.body, {"monitoring": {"schedule": "0 3 * * 5-1"}}).message
        assert "monitoring" not in _change(server, created.body, {"monitoring": None}).body["spec"]
    finally:
        server.call("DELETE", f"{JOBS}/{manifest['metadata']['name']}")


@pytest.mark.parametrize("limit", ["activeDeadlineSeconds", "maxGpuHours"])
def test_a_limit_cannot_be_added_later(server, job, limit):
    assert _change(server, job, {limit: None}).code == 200
    answer = _change(server, job, {limit: 7200})
    assert answer.code == 422
    assert f"{limit} can only be raised or removed" in answer.message


def test_applying_the_same_manifest_again_changes_nothing(server, job):
    """A default that the server filled in is not a change of an immutable field."""
    manifest = {key: job[key] for key in ("apiVersion", "kind")} | {"metadata": {"name": job["metadata"]["name"]}}
    manifest["spec"] = read_manifests((CORPUS / "good/minimal.yaml").read_text())[0]["spec"] | {
        "activeDeadlineSeconds": 3600,
        "maxGpuHours": 10,
    }
    path = f"{JOBS}/{job['metadata']['name']}?fieldManager=test&force=true"
    answer = server.call("PATCH", path, json.dumps(manifest), kind="application/apply-patch+yaml")
    assert answer.code == 200, answer.message
    assert answer.body["metadata"]["generation"] == job["metadata"]["generation"]


STATUS = {
    "observedGeneration": 1,
    "phase": "Training",
    "message": "step 420 of 1260",
    "warnings": ["40 examples are few for full tuning"],
    "model": {"parameters": 494032768, "trainedParameters": 1081344},
    "usage": {"gpuSeconds": 5400.0, "trainedTokens": 6100000, "countedTime": "2026-01-31T12:00:00Z"},
    "plan": {
        "parameters": 494032768,
        "processes": 2,
        "strategy": "ddp",
        "memoryPerGpu": {"weights": 988097824, "activations": 2147483648, "total": 3135581472},
        "fits": True,
        "steps": 1260,
        "gpuHours": 1.25,
    },
    "checkpoints": {"best": {"step": 400, "uri": "pvc://models/a/400", "metric": "validation/loss", "value": 1.31}},
    "artifacts": [{"kind": "merged", "uri": "pvc://models/a/merged", "digest": "sha256:0", "bytes": 988097824}],
    "conditions": [
        {
            "type": "GatesPassed",
            "status": "True",
            "observedGeneration": 1,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "reason": "GatesPassed",
        }
    ],
    "data": {"made": 40, "madeSamples": ["a prompt"], "tokensPerExample": {"min": 4, "median": 40, "p95": 90, "max": 120}},
    "baseline": [{"prompt": "few-shot", "metric": "task/exactMatch", "value": 0.61, "low": 0.5, "high": 0.7, "best": True}],
    "search": {
        "trials": 8,
        "completed": 5,
        "best": {"trial": 3, "value": 1.5, "parameters": {"method.lora.rank": 8, "training.packing": True}},
    },
    "evaluation": {
        "results": [
            {
                "metric": "task/exactMatch",
                "value": 0.88,
                "baseline": 0.61,
                "difference": {"value": 0.27, "low": 0.2, "high": 0.3},
                "n": 500,
                "compared": [{"with": "other", "value": 0.8}],
            }
        ],
        "gates": [{"metric": "task/exactMatch", "verdict": "Passed", "observed": 0.88, "required": "at least 0.8"}],
        "health": [{"name": "overfitting", "verdict": "Good"}],
        "candidate": 400,
    },
    "monitoring": {
        "runs": 2,
        "failedRuns": 1,
        "schedule": "0 3 * * *",
        "nextRunTime": "2026-01-02T03:00:00Z",
        "results": [
            {"metric": "task/f1", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "released": 0.8, "difference": -0.3, "verdict": "Degraded"}
        ],
        "failure": {"reason": "DatasetNotFound", "message": "there is no such file"},
    },
    "attempt": {"number": 2},
    "progress": {"percent": 33},
    "metrics": [{"name": "validation/loss", "value": 1.31}, {"name": "train/loss", "value": 1.18}],
}


def test_the_columns_come_from_the_status(server, job):
    path = f"{JOBS}/{job['metadata']['name']}"
    answer = server.call("PATCH", f"{path}/status", {"status": STATUS}, kind="application/merge-patch+json")
    assert answer.code == 200, answer.message
    assert answer.body["status"] == STATUS
    table = server.call("GET", path, accept="application/json;as=Table;v=v1;g=meta.k8s.io").body
    cells = dict(zip([column["name"] for column in table["columnDefinitions"]], table["rows"][0]["cells"], strict=True))
    del cells["Age"]
    assert cells == {
        "Name": job["metadata"]["name"],
        "Phase": "Training",
        "Progress": 33,
        "Loss": 1.18,
        "Gates": "True",
        "Attempt": 2,
        "Message": "step 420 of 1260",
    }


def test_a_new_jobs_columns_are_empty(server, job):
    table = server.call("GET", f"{JOBS}/{job['metadata']['name']}", accept="application/json;as=Table;v=v1;g=meta.k8s.io").body
    assert table["rows"][0]["cells"][1:7] == [None] * 6


@pytest.mark.parametrize(
    "status",
    [
        {"phase": "Dreaming"},
        {"progress": {"percent": 101}},
        {"metrics": [{"name": "a"}]},
        {"conditions": [{"type": "Ready"}]},
        {"startTime": "noon"},
        {"warnings": ["x" * 513]},
        {"warnings": ["x"] * 9},
        {"model": {"parameters": -1}},
        {"checkpoints": {"best": {"step": 400, "uri": "pvc://a"}}},
        {"evaluation": {"gates": [{"metric": "a/b", "verdict": "Maybe", "required": "at least 1"}]}},
        {"baseline": [{"metric": "a/b", "value": 1}]},
        {"artifacts": [{"kind": "gguf", "uri": "pvc://a", "digest": "sha256:0", "bytes": 1}]},
    ],
    ids=lambda status: json.dumps(status)[:80],
)
def test_a_status_that_means_nothing_is_refused(server, job, status):
    path = f"{JOBS}/{job['metadata']['name']}/status"
    assert server.call("PATCH", path, {"status": status}, kind="application/merge-patch+json").code == 422
