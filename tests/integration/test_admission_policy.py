"""The chart's ValidatingAdmissionPolicy, its expressions judged by a real API server's CEL on good and bad jobs.

An API server that knows nothing but CustomResourceDefinitions evaluates them as rules of a definition made for this test: its objects hold
the job under `object` and the job's namespace under `namespaceObject`, which the expressions read. Their CEL environment is the same.
"""

import copy
import os
import ssl
import time
import uuid
from typing import Any

import helm_python
import pytest
from tests.integration.test_crd import Server
from tests.unit.chart.rendering import CHART, one, render

from finetune_api.crd import job_schema

pytestmark = pytest.mark.api

GROUP, PLURAL = "policies.tests.example", "admissions"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
OBJECTS = f"/apis/{GROUP}/v1/namespaces/default/{PLURAL}"


def policy() -> dict[str, Any]:
    """The policy as the chart renders it."""
    with helm_python.Chart.load(CHART) as chart:
        return dict(
            one(render(chart, {"admissionPolicy": {"enabled": True, "schemes": ["hf", "pvc"]}}), "ValidatingAdmissionPolicy")["spec"]
        )


def without_rules(schema: Any) -> Any:
    """A schema without its own rules and defaults, so that the policy alone judges."""
    if isinstance(schema, dict):
        dropped = ("x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "default", "required")
        kept = {key: value for key, value in schema.items() if key not in dropped}
        return {key: without_rules(value) for key, value in kept.items()}
    return [without_rules(each) for each in schema] if isinstance(schema, list) else schema


def as_rule(expression: str, variables: dict[str, str]) -> str:
    """An expression of the policy as a rule of a definition."""
    for name in reversed(variables):  # a later one may use an earlier one
        expression = expression.replace(f"variables.{name}", f"({variables[name]})")
    return expression.replace("namespaceObject.", "self.namespaceObject.").replace("object.spec", "self.object.spec")


def definition() -> dict[str, Any]:
    spec = policy()
    variables = {each["name"]: each["expression"] for each in spec["variables"]}
    rules = []
    for each in spec["validations"]:
        words = {"messageExpression": as_rule(each["messageExpression"], variables)} if "messageExpression" in each else {}
        rules.append({"rule": as_rule(each["expression"], variables), "message": each.get("message", "refused"), **words})
    short = {"type": "string", "maxLength": 256}
    annotations = {"type": "object", "maxProperties": 8, "additionalProperties": short}
    namespace = {"type": "object", "properties": {"metadata": {"type": "object", "properties": {"annotations": annotations}}}}
    job = {"type": "object", "properties": {"spec": without_rules(job_schema()["properties"]["spec"])}}
    schema = {"type": "object", "properties": {"object": job, "namespaceObject": namespace}, "x-kubernetes-validations": rules}
    names = {"kind": "Admission", "listKind": "AdmissionList", "plural": PLURAL, "singular": "admission"}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


@pytest.fixture(scope="module")
def server():
    url = os.environ.get("FINETUNE_CRD_API")
    if not url:
        pytest.skip("no API server with CEL for tests: set FINETUNE_CRD_API (and FINETUNE_CRD_TOKEN)")
    found = Server(url, ssl._create_unverified_context(), os.environ.get("FINETUNE_CRD_TOKEN"))  # noqa: S323 - a server for tests
    found.call("DELETE", f"{DEFINITIONS}/{PLURAL}.{GROUP}")
    wait(lambda: found.call("GET", f"{DEFINITIONS}/{PLURAL}.{GROUP}").code == 404)
    created = found.call("POST", DEFINITIONS, definition())
    assert created.code == 201, created.message
    wait(lambda: found.call("GET", OBJECTS).code == 200)
    yield found
    found.call("DELETE", f"{DEFINITIONS}/{PLURAL}.{GROUP}")


def wait(condition):
    """Wait until it holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


SPEC = {
    "model": {"source": "hf://Qwen/Qwen3-0.6B"},
    "data": {"train": {"source": "pvc://data/train.jsonl"}},
    "method": {"lora": {}},
    "output": {"storage": "pvc://models/bot"},
    "profileRef": {"name": "small"},
}
ALLOWS_SMALL = {"finetune.dev/profiles": "large, small"}
SUITE = {"name": "task", "metrics": ["exactMatch"]}


def asked(server: Server, spec: dict[str, Any], annotations: dict[str, str] | None) -> Any:
    """What is said to a job with these parts in a namespace with these annotations."""
    metadata = {} if annotations is None else {"annotations": annotations}
    whole = {key: value for key, value in {**copy.deepcopy(SPEC), **spec}.items() if value is not None}
    content = {
        "apiVersion": f"{GROUP}/v1",
        "kind": "Admission",
        "metadata": {"name": f"a{uuid.uuid4().hex[:8]}"},
        "object": {"spec": whole},
        "namespaceObject": {"metadata": metadata},
    }
    return server.call("POST", f"{OBJECTS}?dryRun=All&fieldValidation=Strict", content)


TRUSTING = {"model": {"source": "hf://a/b", "trustRemoteCode": True}}
GOOD = [
    ({}, ALLOWS_SMALL),
    ({}, {"finetune.dev/profiles": "small"}),
    ({}, {"finetune.dev/profiles": "*"}),
    ({"output": {}}, ALLOWS_SMALL),
    ({"output": None}, ALLOWS_SMALL),
    ({"data": {"train": {"configMap": {"name": "a", "key": "b.jsonl"}}}}, ALLOWS_SMALL),
    ({"model": {"source": "hf://a/b", "trustRemoteCode": False}}, ALLOWS_SMALL),
    (TRUSTING, {**ALLOWS_SMALL, "finetune.dev/allow-remote-code": "true"}),
    ({"evaluation": {"suites": [{**SUITE, "source": "test"}, {**SUITE, "name": "b", "source": "pvc://a/b"}]}}, ALLOWS_SMALL),
]
BAD = [
    ({"profileRef": None}, ALLOWS_SMALL, "spec.profileRef.name must name a TuningProfile"),
    ({"profileRef": {"name": "huge"}}, ALLOWS_SMALL, "the profile huge is not one of this namespace"),
    ({"profileRef": {"name": "huge"}}, ALLOWS_SMALL, "large, small"),
    ({"profileRef": {"name": "smal"}}, ALLOWS_SMALL, "the profile smal is not one of this namespace"),
    ({}, {}, "it has none"),
    ({}, None, "it has none"),
    ({}, {"finetune.dev/profiles": ""}, "the profile small is not one of this namespace"),
    ({}, {"finetune.dev/profiles": "smaller,small-2"}, "the profile small is not one of this namespace"),
    ({"model": {"source": "file:///etc"}}, ALLOWS_SMALL, "spec.model.source: this platform takes hf, pvc only"),
    ({"model": {"source": "s3://bucket/model"}}, ALLOWS_SMALL, "spec.model.source: this platform takes hf, pvc only"),
    ({"data": {"train": {"source": "file://data.jsonl"}}}, ALLOWS_SMALL, "spec.data.train.source: this platform takes hf, pvc only"),
    ({"output": {"storage": "s3://bucket/out"}}, ALLOWS_SMALL, "spec.output.storage: this platform takes hf, pvc only"),
    ({"evaluation": {"suites": [{**SUITE, "source": "s3://bucket/x"}]}}, ALLOWS_SMALL, "spec.evaluation.suites: this platform takes"),
    (TRUSTING, ALLOWS_SMALL, "spec.model.trustRemoteCode needs the namespace's annotation"),
    (TRUSTING, {**ALLOWS_SMALL, "finetune.dev/allow-remote-code": "false"}, "spec.model.trustRemoteCode needs the namespace's annotation"),
]


@pytest.mark.parametrize(("spec", "annotations"), GOOD)
def test_what_the_namespace_allows_is_taken(server, spec, annotations):
    answer = asked(server, spec, annotations)
    assert answer.code == 201, answer.message


@pytest.mark.parametrize(("spec", "annotations", "words"), BAD)
def test_what_it_does_not_allow_is_refused_in_words(server, spec, annotations, words):
    answer = asked(server, spec, annotations)
    assert answer.code == 422, answer.body
    assert words in answer.message
