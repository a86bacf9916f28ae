"""parse_job on JSON values as a client may send them, where YAML's reader has not been before."""

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune_api.v1alpha1 import DataSource, Endpoint, HeldOutSource, ModelSource, SecretReference, Teacher, parse_job
from finetune_operator.manifest import explain, read_manifests

MINIMAL = (Path(__file__).parents[3] / "tests/data/jobs/good/minimal.yaml").read_text(encoding="utf-8")


def job_with(**spec):
    (manifest,) = read_manifests(MINIMAL)
    return {**manifest, "spec": {**manifest["spec"], **spec}}


def test_a_whole_float_is_an_integer_as_it_is_to_the_api_server():
    training = parse_job(job_with(training={"epochs": 3.0, "microBatchSize": 4.0})).spec.training
    assert json.dumps([training.epochs, training.micro_batch_size]) == "[3, 4]"


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf, 10**400])
def test_what_is_no_number_is_no_learning_rate(rate):
    with pytest.raises(ValidationError) as refused:
        parse_job(job_with(training={"learningRate": rate}))
    assert "learningRate" in str(refused.value)


def test_fields_are_written_in_camel_case_alone():
    with pytest.raises(ValidationError) as refused:
        parse_job(job_with(backoff_limit=1))
    assert explain(refused.value) == ["spec.backoff_limit: unknown field; did you mean backoffLimit?"]


def test_what_the_api_server_adds_to_the_metadata_is_no_fault():
    added = {
        "uid": "u-1",
        "generation": 2,
        "resourceVersion": "7",
        "creationTimestamp": "2026-11-21T09:00:00Z",
        "managedFields": [{"manager": "kubectl"}],
        "ownerReferences": [],
    }
    job = parse_job({**job_with(), "metadata": {"name": "a", "namespace": "n", **added}})
    assert (job.metadata.uid, job.metadata.generation, job.metadata.resource_version) == ("u-1", 2, "7")


def test_a_status_of_another_version_does_not_hide_the_spec():
    status = {"observedGeneration": 1, "phase": "Training", "fieldOfTomorrow": {"a": 1}}
    assert parse_job({**job_with(), "status": status}).status.phase == "Training"


def test_a_jobs_parts_cannot_be_changed():
    job = parse_job(job_with())
    with pytest.raises(ValidationError, match="frozen"):
        job.spec.training.epochs = 5


def test_validation_data_of_its_own_is_a_data_source():
    assert HeldOutSource(fraction=0.2).data_source() is None
    assert HeldOutSource(source="pvc://a/b").data_source() == DataSource(source="pvc://a/b")
    hub = {"source": "hf://datasets/a/b", "split": "test", "subset": "en"}
    assert HeldOutSource(**hub).data_source() == DataSource(**hub)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("full", "model"),
        ("lora", "adapter"),
        ("adapter", "adapter"),
        ("ia3", "adapter"),
        ("promptTuning", "adapter"),
        ("pTuning", "adapter"),
    ],
)
def test_without_artifacts_a_job_publishes_what_its_method_makes(method, kind):
    spec = parse_job(job_with(method={method: {}})).spec
    assert spec.method.chosen == method
    assert spec.artifacts == (kind,)


def test_a_job_publishes_the_artifacts_that_it_names():
    assert parse_job(job_with(output={"storage": "pvc://a", "artifacts": ["merged", "adapter"]})).spec.artifacts == ("merged", "adapter")


def test_a_teacher_with_files_is_a_model_to_load():
    teacher = Teacher(source="hf://a/b", revision="main", secret_ref=SecretReference(name="hub"))
    assert teacher.model_source() == ModelSource(source="hf://a/b", revision="main", secret_ref=SecretReference(name="hub"))
    assert Teacher(endpoint=Endpoint(url="http://vllm:8000/v1", model="m")).model_source() is None


def test_explanations_of_long_values_are_short():
    with pytest.raises(ValidationError) as refused:
        parse_job(job_with(training={"scheduler": "x" * 10_000}))
    (line,) = explain(refused.value)
    assert line.startswith(
        "spec.training.scheduler: must be one of 'cosine', 'linear', 'constant', 'warmupStableDecay' or 'inverseSqrt', not 'xxx"
    )
    assert len(line) < 200
