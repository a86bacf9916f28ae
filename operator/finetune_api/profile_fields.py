"""Bounded field types of a TuningProfile: the beginnings of URIs, and a template of a storage."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints

from finetune_api.fields import ENDPOINT_URL, NO_PARENT_PATH, PATH, STORAGE_URI, check, described, rule, rules

_SOURCE_PREFIX = rf"^(hf|s3|pvc)://([A-Za-z0-9_][A-Za-z0-9_.-]*{PATH})?$"
_STORAGE_PREFIX = rf"^(s3|pvc)://([A-Za-z0-9_][A-Za-z0-9_.-]*{PATH})?$"


def _without_parents(value: str) -> str:
    check(".." not in value, NO_PARENT_PATH["message"])
    return value


def _prefix(pattern: str, forms: str) -> Any:  # noqa: ANN401 - an annotation
    """The beginning of a URI."""
    return Annotated[
        str,
        StringConstraints(min_length=1, max_length=512, pattern=pattern),
        described(f"{forms}, at most 512 characters"),
        AfterValidator(_without_parents),
        Field(json_schema_extra=rules(NO_PARENT_PATH)),
    ]


SourcePrefix = _prefix(_SOURCE_PREFIX, "the beginning of an hf://, s3:// or pvc:// URI, such as hf://Qwen/ or pvc://models")
StoragePrefix = _prefix(_STORAGE_PREFIX, "the beginning of an s3:// or pvc:// URI")
S3Endpoint = _prefix(ENDPOINT_URL, "http://host[:port][/path] or https://host[:port][/path] of an S3 server")
EndpointPrefix = _prefix(ENDPOINT_URL, "the beginning of a URL, such as https://models.example.com/v1")

NAMESPACE_WORD, NAME_WORD = "{namespace}", "{name}"
_STORAGE_RULES = (
    NO_PARENT_PATH,
    rule(
        f"self.replace('{NAMESPACE_WORD}', 'xxx').replace('{NAME_WORD}', 'xxx').matches(r'{STORAGE_URI}')",
        "storage must be pvc://claim/path or s3://bucket/path, in which {namespace} and {name} stand for the job's",
    ),
    rule(f"self.contains('{NAME_WORD}')", "storage must contain {name}: each job needs a place of its own"),
    rule(
        f"!self.startsWith('s3://') || self.contains('{NAMESPACE_WORD}')",
        "an s3:// storage must contain {namespace}: jobs of two namespaces may have one name",
    ),
)


def _check_storage(template: str) -> str:
    parents, form, named, spaced = (entry["message"] for entry in _STORAGE_RULES)
    check(".." not in template, parents)
    filled = template.replace(NAMESPACE_WORD, "xxx").replace(NAME_WORD, "xxx")
    check(re.fullmatch(STORAGE_URI, filled) is not None, form)
    check(NAME_WORD in template, named)
    check(not template.startswith("s3://") or NAMESPACE_WORD in template, spaced)
    return template


StorageTemplate = Annotated[
    str,
    StringConstraints(min_length=1, max_length=512),
    AfterValidator(_check_storage),
    Field(json_schema_extra=rules(*_STORAGE_RULES)),
]
