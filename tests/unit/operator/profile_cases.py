"""Profiles of tests, as the API server returns them."""

from typing import Any


def raw_profile(name: str = "small", *, default: bool = False, created: str = "2026-01-01T00:00:00Z", **spec: Any) -> dict[str, Any]:
    """A TuningProfile; `spec` is its spec in JSON's names."""
    annotations = {"finetune.dev/is-default-profile": "true"} if default else {}
    meta = {"name": name, "generation": 1, "creationTimestamp": created, "annotations": annotations}
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "TuningProfile", "metadata": meta, "spec": spec}
