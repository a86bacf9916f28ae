"""What somebody asked of an API server, by its audit log; and what roles grant."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

Use = tuple[str, str, str]
"""Group, resource (with its subresource) and verb, as RBAC names them."""


def uses(lines: Iterable[str], user: str) -> Iterator[tuple[Use, dict[str, Any]]]:
    """What a user asked of the API server, and the audit log's word on it. Lines that are cut off are left out."""
    for line in lines:
        if user not in line:
            continue
        try:
            event = json.loads(line)
        except ValueError:
            continue
        about = event.get("objectRef")
        if event["user"]["username"] == user and about:
            resource = about["resource"] + (f"/{about['subresource']}" if about.get("subresource") else "")
            yield (about.get("apiGroup", ""), resource, event["verb"]), event


def granted(roles: Iterable[dict[str, Any]]) -> set[Use]:
    return {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
