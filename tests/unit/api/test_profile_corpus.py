"""Every manifest of tests/data/profiles as pydantic judges it. The first line of a bad one names the place at fault.

tests/integration/test_profile_crd.py asks an API server for its verdict on the same files.
"""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from finetune_api.methods import METHODS
from finetune_api.objectives import OBJECTIVES
from finetune_api.profile import MethodName, ObjectiveName, parse_profile
from finetune_api.profile_crd import profile_definition, profile_schema
from finetune_operator.manifest import explain, read_manifests

ROOT = Path(__file__).parents[3]
GOOD = sorted((ROOT / "tests/data/profiles/good").glob("*.yaml"))
BAD = sorted((ROOT / "tests/data/profiles/bad").glob("*.yaml"))


def read(path):
    """The one manifest of a file."""
    (manifest,) = read_manifests(path.read_text(encoding="utf-8"))
    return manifest


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_a_good_profile_is_accepted(path):
    assert parse_profile(read(path)).metadata.name == path.stem


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_a_bad_profile_is_refused_for_its_one_fault(path):
    place = path.read_text(encoding="utf-8").removeprefix("# ").split(":")[0]
    with pytest.raises(ValidationError) as refused:
        parse_profile(read(path))
    assert [line.split(": ")[0] for line in explain(refused.value)] == [place]


def test_the_corpus_is_large():
    assert len(GOOD) >= 5
    assert len(BAD) >= 35


def test_absent_and_empty_lists_are_told_apart():
    nothing, anything = (parse_profile(read(ROOT / f"tests/data/profiles/good/{name}.yaml")) for name in ("nothing-allowed", "minimal"))
    assert (nothing.spec.allow.models, anything.spec.allow.models) == ((), None)


def test_the_default_is_marked_by_its_annotation():
    everything = read(ROOT / "tests/data/profiles/good/everything.yaml")
    assert parse_profile(everything).is_default
    everything["metadata"]["annotations"] = {"finetune.dev/is-default-profile": "false"}
    assert not parse_profile(everything).is_default


def test_methods_and_objectives_are_those_of_jobs():
    assert get_args(MethodName) == METHODS
    assert get_args(ObjectiveName) == OBJECTIVES


def nodes(schema, path=""):
    """Every schema inside a schema, with its path."""
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}".lstrip("."))
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if key in schema:
            yield from nodes(schema[key], path + mark)


NODES = {path: node for path, node in nodes(profile_schema()) if path.startswith("spec")}


@pytest.mark.parametrize(
    ("kind", "bound"), [("string", "maxLength"), ("array", "maxItems"), ("map", "maxProperties"), ("integer", "minimum")]
)
def test_everything_a_platform_writes_is_bounded(kind, bound):
    kinds = {path: "map" if "additionalProperties" in node else node.get("type") for path, node in NODES.items() if "enum" not in node}
    found = [path for path, each in kinds.items() if each == kind]
    assert found
    assert [path for path in found if bound not in NODES[path]] == []


def test_every_field_is_described():
    assert [path for path, node in NODES.items() if not node.get("description") and not path.endswith(("[]", "{}"))] == []


def test_names_and_scope():
    spec = profile_definition()["spec"]
    assert spec["scope"] == "Cluster"
    assert spec["names"]["shortNames"] == ["tprof"]
    assert "subresources" not in spec["versions"][0]  # nobody writes a status of it
