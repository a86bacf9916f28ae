"""The models as a CustomResourceDefinition: a structural schema with defaults, bounds and CEL rules. Pure.

JSON Schema as pydantic writes it says more than a structural schema may, and says some things differently:

==========================================  ===============================================================
pydantic                                    structural schema
==========================================  ===============================================================
`$ref` to `$defs`                           written out in place
`anyOf: [X, null]`                          X, not required (a null is dropped or refused, as the models do)
`anyOf: [integer, string]`                  `x-kubernetes-int-or-string`, with the bounds of both
`const`                                     `enum` with one value
`exclusiveMinimum: v`                       `minimum: v, exclusiveMinimum: true`
`patternProperties`, `propertyNames`        `additionalProperties`, and a CEL rule for the keys
`title`, `additionalProperties: false`      left out: the server itself refuses unknown fields
==========================================  ===============================================================
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from finetune_api import GROUP, JOB_NAME_MAX, KIND, PLURAL, VERSION
from finetune_api.evaluation import NOT_BESIDE_ITSELF
from finetune_api.fields import JOB_NAME_PATTERN, rule, rules
from finetune_api.status import Status
from finetune_api.v1alpha1 import FineTuneJob, Spec

Schema = dict[str, Any]

PRINTER_COLUMNS = (
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase", "description": "Where the job stands."},
    {
        "name": "Progress",
        "type": "integer",
        "jsonPath": ".status.progress.percent",
        "description": "Share of the training steps that is done, in percent.",
    },
    {
        "name": "Loss",
        "type": "number",
        "jsonPath": '.status.metrics[?(@.name=="train/loss")].value',
        "description": "Latest training loss.",
    },
    {
        "name": "Gates",
        "type": "string",
        "jsonPath": '.status.conditions[?(@.type=="GatesPassed")].status',
        "description": "Whether the tuned model passed all gates; empty where the job has none.",
    },
    {
        "name": "Attempt",
        "type": "integer",
        "jsonPath": ".status.attempt.number",
        "priority": 1,
        "description": "Number of the current set of pods.",
    },
    {
        "name": "Message",
        "type": "string",
        "jsonPath": ".status.message",
        "priority": 1,
        "description": "What the job is doing, or why it does not.",
    },
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
)


def custom_resource_definition() -> dict[str, Any]:
    """The CustomResourceDefinition of the FineTuneJob, as `kubectl apply` takes it."""
    names = {**names_of(KIND, PLURAL), "shortNames": ["ftj"], "categories": ["all", "ml"]}
    return definition_of("Namespaced", names, {"subresources": {"status": {}}}, PRINTER_COLUMNS, job_schema())


def names_of(kind: str, plural: str) -> dict[str, Any]:
    """The names that every definition has."""
    return {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()}


def definition_of(scope: str, names: dict[str, Any], more: dict[str, Any], columns: Sequence[Mapping[str, Any]], schema: Schema) -> Schema:
    """A CustomResourceDefinition of this group; `more` is what its one version has besides columns and schema."""
    version = {"name": VERSION, "served": True, "storage": True, **more}
    version |= {"additionalPrinterColumns": [dict(column) for column in columns], "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names['plural']}.{GROUP}", "labels": {"app.kubernetes.io/part-of": "finetune-operator"}},
        "spec": {"group": GROUP, "scope": scope, "names": names, "versions": [version]},
    }


def job_schema() -> Schema:
    """The structural schema of a FineTuneJob."""
    return {
        "type": "object",
        "description": _words(FineTuneJob.__doc__),
        "required": ["spec"],
        **rules(NOT_BESIDE_ITSELF),
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}"},
            "kind": {"type": "string", "description": KIND},
            # Of the metadata a schema may bound the name alone.
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": JOB_NAME_MAX, "pattern": JOB_NAME_PATTERN}},
            },
            "spec": model_schema(Spec),
            # kstatus takes an object without status for finished; -1 says that the operator has not seen it yet.
            "status": {**_without_defaults(model_schema(Status)), "default": {"observedGeneration": -1}},
        },
    }


def model_schema(model: type[BaseModel]) -> Schema:
    """The structural schema of one model."""
    schema = model.model_json_schema(by_alias=True, schema_generator=_SchemaWithPlainDefaults)
    return structural(schema, schema.get("$defs", {}))


class _SchemaWithPlainDefaults(GenerateJsonSchema):
    """A default that is a model is written out in full, without absent fields: the server checks it before it fills in defaults."""

    def encode_default(self, dft: Any) -> Any:  # noqa: ANN401 - the signature is pydantic's
        """The JSON value of a default."""
        if isinstance(dft, BaseModel):
            return dft.model_dump(mode="json", by_alias=True, exclude_none=True)
        return super().encode_default(dft)


_COPIED = (
    "type",
    "format",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "pattern",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "required",
    "oneOf",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
)


def structural(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """One schema of pydantic's as a structural schema. Raises ValueError for what has no counterpart."""
    schema = _resolved(schema, definitions)
    result: Schema = {}
    if "description" in schema:
        result["description"] = _words(schema["description"])
    if schema.get("default") is not None:
        result["default"] = schema["default"]
    result |= {key: schema[key] for key in _COPIED if key in schema}
    result |= _rewritten(schema)
    if "items" in schema:
        result["items"] = structural(schema["items"], definitions)
    validations = list(schema.get("x-kubernetes-validations", []))
    if "properties" in schema:
        result["properties"] = {name: structural(field, definitions) for name, field in schema["properties"].items()}
    elif schema.get("type") == "object":
        values, key_rules = _map(schema)
        if values is not None:
            result["additionalProperties"] = structural(values, definitions)
        validations += key_rules
    return {**result, "x-kubernetes-validations": validations} if validations else result


def _rewritten(schema: Schema) -> Schema:
    """What OpenAPI 3.0 says in other words than JSON Schema."""
    result: Schema = {"enum": [schema["const"]]} if "const" in schema else {}
    for bound, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in schema:
            result |= {inclusive: schema[bound], bound: True}
    return result


def _resolved(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The schema without `$ref` and `anyOf`. What stands beside a reference, such as a description, wins over what it refers to."""
    if "$ref" in schema:
        target = definitions[schema["$ref"].removeprefix("#/$defs/")]
        return _resolved({**target, **{key: value for key, value in schema.items() if key != "$ref"}}, definitions)
    if "anyOf" not in schema:
        return schema
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    members = [member for member in schema["anyOf"] if member.get("type") != "null"]
    if schema.get("x-kubernetes-int-or-string"):
        return {**_int_or_string(members), **rest}
    if len(members) != 1:
        raise ValueError(f"a union has no structural schema: {schema}")
    return _resolved({**members[0], **rest}, definitions)


def _int_or_string(members: list[Schema]) -> Schema:
    """The bounds of both members: those of numbers do not touch strings, nor the other way round."""
    merged: Schema = {}
    for member in members:
        merged |= {key: value for key, value in member.items() if key not in ("type", "const", "title")}
        if "const" in member:
            merged |= {"pattern": f"^{member['const']}$", "maxLength": len(member["const"])}
    return merged


def _map(schema: Schema) -> tuple[Schema | None, list[dict[str, str]]]:
    """The schema of a map's values (None for an object without fields) and the CEL rules of its keys."""
    names = schema.get("propertyNames", {})
    rules = []
    values = schema.get("additionalProperties") or None
    for pattern, value_schema in schema.get("patternProperties", {}).items():
        values = value_schema
        rules.append(rule(f"self.all(key, key.matches(r'{pattern}'))", f"every key must match {pattern}"))
    if "maxLength" in names:
        rules.append(rule(f"self.all(key, key.size() <= {names['maxLength']})", f"a key has at most {names['maxLength']} characters"))
    if "enum" in names:
        words = ", ".join(names["enum"])
        rules.append(rule(f"self.all(key, key in {names['enum']})", f"every key must be one of {words}"))
    return values, rules


def _without_defaults(schema: Schema) -> Schema:
    """The status holds what the operator wrote and nothing else."""
    result = {key: value for key, value in schema.items() if key != "default"}
    if "properties" in result:
        result["properties"] = {name: _without_defaults(field) for name, field in result["properties"].items()}
    if "items" in result:
        result["items"] = _without_defaults(result["items"])
    return result


def _words(text: str | None) -> str:
    """A docstring as one line."""
    return " ".join((text or "").split())
