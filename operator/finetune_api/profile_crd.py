"""The CustomResourceDefinition of the TuningProfile. Pure."""

from typing import Any

from finetune_api import GROUP, VERSION
from finetune_api.crd import Schema, definition_of, model_schema, names_of
from finetune_api.fields import LABEL_PATTERN
from finetune_api.profile import DEFAULT_PROFILE, PROFILE_KIND, PROFILE_NAME_MAX, PROFILE_PLURAL, ProfileSpec, TuningProfile

PROFILE_COLUMNS = (
    {
        "name": "Default",
        "type": "string",
        "jsonPath": f".metadata.annotations.{DEFAULT_PROFILE.replace('.', chr(92) + '.')}",
        "description": "Whether jobs that name no profile get this one.",
    },
    {"name": "Workers", "type": "integer", "jsonPath": ".spec.limits.workers", "description": "Most workers of a job."},
    {"name": "GPUs", "type": "integer", "jsonPath": ".spec.limits.gpus", "description": "Most GPUs of a job."},
    {
        "name": "Seconds",
        "type": "integer",
        "jsonPath": ".spec.limits.activeDeadlineSeconds",
        "description": "Longest time from the start of a job to its end.",
    },
    {"name": "Description", "type": "string", "jsonPath": ".spec.description", "description": "For people who choose a profile."},
    {"name": "Image", "type": "string", "jsonPath": ".spec.trainerImage", "priority": 1, "description": "Image of the pods."},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
)


def profile_definition() -> dict[str, Any]:
    """The CustomResourceDefinition of the TuningProfile, as `kubectl apply` takes it."""
    names = {**names_of(PROFILE_KIND, PROFILE_PLURAL), "shortNames": ["tprof"], "categories": ["ml"]}
    return definition_of("Cluster", names, {}, PROFILE_COLUMNS, profile_schema())


def profile_schema() -> Schema:
    """The structural schema of a TuningProfile."""
    return {
        "type": "object",
        "description": " ".join((TuningProfile.__doc__ or "").split()),
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}"},
            "kind": {"type": "string", "description": PROFILE_KIND},
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": PROFILE_NAME_MAX, "pattern": LABEL_PATTERN}},
            },
            # A profile may offer nothing but its name: everything is as the operator's settings have it.
            "spec": {**model_schema(ProfileSpec), "default": {}},
        },
    }
