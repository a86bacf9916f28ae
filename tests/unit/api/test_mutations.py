"""Whatever is done to a manifest, the answer is a job or a ValidationError that can be explained; and a job stays what it is."""

import json
import os

from hypothesis import HealthCheck, given, settings
from mutants import GOOD, mutants
from pydantic import ValidationError

from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_operator.manifest import explain

NUMBER = int(os.environ.get("FINETUNE_MUTATIONS", "300"))
"""How many are looked at: 100,000 take some minutes."""


def as_manifest(job: FineTuneJob) -> dict:
    return {
        "apiVersion": job.api_version,
        "kind": job.kind,
        "metadata": {"name": job.metadata.name},
        "spec": job.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


@given(mutants())
@settings(max_examples=NUMBER, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mutant_is_a_job_or_is_explained(manifest):
    try:
        job = parse_job(manifest)
    except ValidationError as error:
        lines = explain(error)
        assert lines
        assert all(line.strip() for line in lines)
    else:
        # What is stored is judged again at every look: it must be the same job.
        assert parse_job(json.loads(json.dumps(as_manifest(job)))).spec == job.spec


def test_every_good_manifest_is_itself_again_after_it_was_stored():
    for manifest in GOOD:
        job = parse_job(manifest)
        assert parse_job(as_manifest(job)).spec == job.spec
