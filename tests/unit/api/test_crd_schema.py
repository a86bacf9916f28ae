"""The CustomResourceDefinition's shape. Whether an API server takes it, and judges as pydantic does: tests/integration/test_crd.py."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from finetune_api.crd import custom_resource_definition, job_schema, model_schema
from finetune_api.v1alpha1 import Spec


def nodes(schema, path=""):
    """Every schema inside a schema, with its path."""
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}".lstrip("."))
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if key in schema:
            yield from nodes(schema[key], path + mark)


NODES = dict(nodes(job_schema()))

STRUCTURAL = {
    "type",
    "description",
    "default",
    "format",
    "enum",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "pattern",
    "minItems",
    "maxItems",
    "items",
    "minProperties",
    "maxProperties",
    "properties",
    "additionalProperties",
    "required",
    "oneOf",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-validations",
}


def test_every_node_uses_only_what_a_structural_schema_may_say():
    for path, node in NODES.items():
        assert set(node) <= STRUCTURAL, path
        several = node.get("x-kubernetes-int-or-string") or node.get("x-kubernetes-preserve-unknown-fields")
        assert ("type" in node) != bool(several), path
        assert isinstance(node.get("exclusiveMinimum", True), bool), path
        assert not ("properties" in node and "additionalProperties" in node), path


@pytest.mark.parametrize(
    ("kind", "bound"), [("string", "maxLength"), ("array", "maxItems"), ("map", "maxProperties"), ("integer", "minimum")]
)
def test_everything_a_user_writes_is_bounded(kind, bound):
    found = 0
    for path, node in NODES.items():
        is_kind = "additionalProperties" in node if kind == "map" else node.get("type") == kind
        if path.startswith("spec") and is_kind and "enum" not in node:
            assert bound in node, path
            found += 1
    assert found > 0


def test_a_bound_with_a_fraction_is_an_inclusive_maximum():
    """The API server cuts a bound's fraction off where the value is whole: 0 would not be below 0.5, nor too small for it."""
    fractions = {
        (path, bound)
        for path, node in NODES.items()
        for bound in ("minimum", "maximum")
        if path.startswith("spec") and not float(node.get(bound, 0)).is_integer()
    }
    assert fractions == {
        ("spec.data.validation.fraction", "maximum"),
        ("spec.data.test.fraction", "maximum"),
        ("spec.objective.dpo.labelSmoothing", "maximum"),
    }
    assert not any(NODES[path].get("exclusiveMaximum") for path, _ in fractions)


def test_every_field_is_described():
    undescribed = [path for path, node in NODES.items() if not node.get("description") and not path.endswith(("[]", "{}"))]
    assert undescribed == ["metadata", "metadata.name"]  # what these are is Kubernetes' to say


def test_the_models_docstrings_are_the_descriptions():
    assert NODES["spec.training.epochs"]["description"] == "How often the training examples are gone through."
    assert NODES["spec.method"]["description"].startswith("How the weights change")
    assert NODES["spec.method.ia3"]["description"] == "Train vectors that rescale activations ((IA)^3)."


def test_defaults_stand_in_the_schema_where_the_spec_has_them():
    assert NODES["spec.training.learningRate"]["default"] == 0.0002
    assert NODES["spec.data.validation"]["default"] == {"fraction": 0.1}
    assert NODES["spec.objective"]["default"] == {"sft": {"lossOn": "completion"}}
    assert NODES["spec.compute.workers"]["default"] == {"min": 1, "max": 1}
    assert NODES["spec.objective.distillation.relation.between"]["default"] == ["tokens"]
    assert "default" not in NODES["spec.activeDeadlineSeconds"]
    assert "default" not in NODES["spec.output.artifacts"]


def test_the_status_has_one_default_which_says_that_nobody_has_looked_yet():
    defaults = {path: node["default"] for path, node in NODES.items() if path.startswith("status") and "default" in node}
    assert defaults == {"status": {"observedGeneration": -1}}


def test_conditions_are_a_map_by_type():
    assert NODES["status.conditions"]["x-kubernetes-list-type"] == "map"
    assert NODES["status.conditions"]["x-kubernetes-list-map-keys"] == ["type"]


def test_names_and_columns():
    spec = custom_resource_definition()["spec"]
    assert spec["names"]["shortNames"] == ["ftj"]
    assert spec["names"]["categories"] == ["all", "ml"]
    (version,) = spec["versions"]
    assert version["subresources"] == {"status": {}}
    columns = {column["name"]: (column["jsonPath"], column.get("priority", 0)) for column in version["additionalPrinterColumns"]}
    assert columns == {
        "Phase": (".status.phase", 0),
        "Progress": (".status.progress.percent", 0),
        "Loss": ('.status.metrics[?(@.name=="train/loss")].value', 0),
        "Gates": ('.status.conditions[?(@.type=="GatesPassed")].status', 0),
        "Attempt": (".status.attempt.number", 1),
        "Message": (".status.message", 1),
        "Age": (".metadata.creationTimestamp", 0),
    }


def test_every_part_of_the_spec_is_immutable_or_steers_the_run():
    """A new field must be put on one side or the other."""
    steering = {
        "suspend",
        "monitoring",
        "activeDeadlineSeconds",
        "maxGpuHours",
        "preRunningDeadlineSeconds",
        "progressDeadlineSeconds",
        "ttlSecondsAfterFinished",
    }
    rules = {rule["rule"] for rule in NODES["spec"]["x-kubernetes-validations"]}
    for field in Spec.model_fields.values():
        name = field.alias
        always = f"self.{name} == oldSelf.{name}"
        where_set = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})"
        immutable = where_set in rules if field.default is None else always in rules
        assert immutable != (name in steering), name


class _Inner(BaseModel):
    """An inner model."""

    size: int = 1


class _Outer(BaseModel):
    """An outer
    model."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    fixed: Literal["a"] = "a"
    between: Annotated[float, Field(gt=0, lt=1)]
    inner: _Inner | None = None
    """Said of the field."""
    filled: _Inner = _Inner(size=2)
    either: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern="^x$", max_length=1)],
        Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
    ] = 1
    keyed: Annotated[dict[Annotated[str, Field(pattern="^k$", max_length=9)], bool], Field(max_length=2)] = {}


def test_each_rewriting_beside_what_it_should_give():
    assert model_schema(_Outer) == {
        "type": "object",
        "description": "An outer model.",
        "required": ["between"],
        "properties": {
            "fixed": {"type": "string", "enum": ["a"], "default": "a"},
            "between": {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1, "exclusiveMaximum": True},
            "inner": {"type": "object", "description": "Said of the field.", "properties": {"size": {"type": "integer", "default": 1}}},
            "filled": {
                "type": "object",
                "description": "An inner model.",
                "default": {"size": 2},
                "properties": {"size": {"type": "integer", "default": 1}},
            },
            "either": {"x-kubernetes-int-or-string": True, "minimum": 1, "pattern": "^x$", "maxLength": 1, "default": 1},
            "keyed": {
                "type": "object",
                "maxProperties": 2,
                "default": {},
                "additionalProperties": {"type": "boolean"},
                "x-kubernetes-validations": [
                    {"rule": "self.all(key, key.matches(r'^k$'))", "message": "every key must match ^k$"},
                    {"rule": "self.all(key, key.size() <= 9)", "message": "a key has at most 9 characters"},
                ],
            },
        },
    }


def test_a_union_without_a_counterpart_is_an_error():
    class Union(BaseModel):
        either: int | str

    with pytest.raises(ValueError, match="a union has no structural schema"):
        model_schema(Union)
