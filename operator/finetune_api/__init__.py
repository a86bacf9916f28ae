"""The one truth about the API: what a FineTuneJob may say, what its status tells, what a trainer reports.

Pure values (pydantic and the standard library only): no client, no clock, no input or output.

- `v1alpha1`: the FineTuneJob and its spec, with every rule a spec must obey; `sources`, `data`, `methods`, `objectives`, `training` and
  `compute` are its parts
- `status`: the status, its conditions and stages
- `reasons`: the closed set of reasons, the same in conditions, Events, metrics and docs
- `report`: what a trainer tells the operator
- `crd`: the models as a CustomResourceDefinition
- `fields`: the bounded field types and base models that the others are made of
"""

GROUP = "finetune.dev"
VERSION = "v1alpha1"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
API_VERSION = f"{GROUP}/{VERSION}"

LABEL_JOB_NAME = f"{GROUP}/job-name"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_ROLE = f"{GROUP}/role"
LABEL_ATTEMPT = f"{GROUP}/attempt"

ANNOTATION_RETRY = f"{GROUP}/retry"
"""A new value has a failed job tried again."""
ANNOTATION_CANCEL = f"{GROUP}/cancel"
"""true ends the job as Failed, after a checkpoint."""
ANNOTATION_RECONCILE = f"{GROUP}/reconcile"
"""disabled has the operator leave the job alone."""

JOB_NAME_MAX = 48
"""Longest job name: `<job>-<attempt>-worker-<index>` must still be a DNS label (63 characters)."""
