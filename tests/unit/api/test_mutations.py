"""Whatever is done to a manifest, the answer is a job or a ValidationError that can be explained; and a job stays what it is."""

import copy
import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_operator.manifest import explain, read_manifests

GOOD = [
    read_manifests(path.read_text(encoding="utf-8"))[0]
    for path in sorted((Path(__file__).parents[3] / "tests/data/jobs/good").glob("*.yaml"))
]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", "..", "pvc://a/../b", "simplecache::s3://a", "-1", "1e400", "5", "auto", "\ud800", "\x00", 10**400, -(10**400), 1e308]
    ),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3), max_leaves=6
)


def places(value, path=()):
    """The path of every value inside a manifest."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def mutants(draw):
    """A good manifest after one to three changes, each to a value, to a key, or by leaving a value out."""
    manifest = copy.deepcopy(dict(draw(st.sampled_from(GOOD))))
    for _ in range(draw(st.integers(1, 3))):
        *outer, last = draw(st.sampled_from([path for path in places(manifest) if path]))
        parent = manifest
        for part in outer:
            parent = parent[part]
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            parent[last] = draw(VALUES)
        elif change == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=10))] = draw(VALUES)
        else:
            parent.append(draw(VALUES))
        if not manifest:
            break
    return manifest


def as_manifest(job: FineTuneJob) -> dict:
    return {
        "apiVersion": job.api_version,
        "kind": job.kind,
        "metadata": {"name": job.metadata.name},
        "spec": job.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


@given(mutants())
@settings(max_examples=300, deadline=None)
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
