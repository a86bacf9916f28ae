"""Every manifest of tests/data/jobs as pydantic judges it. The first line of a bad one names the place at fault.

tests/integration/test_crd.py asks an API server for its verdict on the same files.
"""

from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune_api.v1alpha1 import parse_job
from finetune_operator.manifest import ManifestError, explain, read_manifests

ROOT = Path(__file__).parents[3]
GOOD = sorted((ROOT / "tests/data/jobs/good").glob("*.yaml"))
BAD = sorted((ROOT / "tests/data/jobs/bad").glob("*.yaml"))
# A local run writes its job with the status beside the manifest.
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("**/*.yaml") if not path.name.endswith(".status.yaml"))


def complaints(path: Path) -> list[str]:
    """What the reader or the models have against a file; empty for a good one."""
    try:
        (manifest,) = read_manifests(path.read_text(encoding="utf-8"))
    except ManifestError as error:
        return [str(error)]
    try:
        parse_job(manifest)
    except ValidationError as error:
        return explain(error, manifest)
    return []


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_a_good_manifest_is_accepted(path):
    assert complaints(path) == []


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_a_bad_manifest_is_refused_for_its_one_fault(path):
    place = path.read_text(encoding="utf-8").removeprefix("# ").split(":")[0]
    (complaint,) = complaints(path)
    # `line 7: spec.model.source: ...`; a map's key follows its field, and an unreadable file has no field.
    assert complaint.removeprefix(complaint.split(": ")[0] + ": ").startswith(place) or complaint.startswith(place)


def test_the_corpus_is_large_and_every_file_says_what_it_shows():
    assert len(GOOD) + len(BAD) >= 150
    for path in GOOD + BAD:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# "), path.name
        assert len(first) > 4, path.name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_job_of_the_examples_is_accepted(path):
    text = path.read_text(encoding="utf-8")
    for manifest in read_manifests(text):
        if manifest.get("kind") == "FineTuneJob":
            parse_job(manifest, local="file://" in text)


def test_the_smallest_example_stays_small():
    lines = (ROOT / "examples/minimal.yaml").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 12


def test_file_sources_are_for_local_runs_alone():
    (manifest,) = read_manifests((ROOT / "tests/data/jobs/good/minimal.yaml").read_text(encoding="utf-8"))
    manifest["spec"] = {**manifest["spec"], "model": {"source": "file:///models/base"}, "output": {"storage": "file://./out"}}
    assert parse_job(manifest, local=True).spec.model.source == "file:///models/base"
    with pytest.raises(ValidationError) as refused:
        parse_job(manifest)
    assert [line.split(":")[0] for line in explain(refused.value)] == ["spec.model.source", "spec.output.storage"]
    manifest["spec"]["model"] = {"source": "file:///models/../etc"}
    with pytest.raises(ValidationError, match=r"must not contain '\.\.'"):
        parse_job(manifest, local=True)
