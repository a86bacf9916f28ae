"""A FineTuneJob in every state, as the API server has it: conditions are made by the operator's own code."""

from datetime import UTC, datetime
from typing import Any, get_args

from finetune_api.reasons import Reason
from finetune_api.status import Phase, Status
from finetune_operator.conditions import Summary, conditions_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPEC: dict[str, Any] = {
    "model": {"source": "pvc://claim/model"},
    "data": {"train": {"source": "pvc://claim/train.jsonl"}},
    "method": {"lora": {}},
    "output": {"storage": "pvc://claim/out"},
}
REASONS: dict[Phase, Reason] = {
    "Pending": Reason.UNSCHEDULABLE,
    "Queued": Reason.PENDING,
    "Preparing": Reason.PREPARING,
    "Baseline": Reason.MEASURING_BASELINE,
    "Searching": Reason.SEARCHING,
    "Training": Reason.TRAINING,
    "Evaluating": Reason.EVALUATING,
    "Publishing": Reason.PUBLISHING,
    "Suspended": Reason.SUSPENDED,
    "Complete": Reason.SUCCEEDED,
    "Failed": Reason.OUT_OF_MEMORY,
}


def job(status: dict[str, Any] | None, *, generation: int = 1, annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {"name": "bot", "namespace": "team", "uid": "u-1", "generation": generation}
    if annotations is not None:
        meta["annotations"] = annotations
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": meta, "spec": {**SPEC, **spec}}
    return manifest if status is None else {**manifest, "status": status}


def status_in(phase: Phase, reason: Reason) -> dict[str, Any]:
    """The status of a job that the operator has looked at in its first generation."""
    summary = Summary(phase, reason, "in words")
    status = Status(observed_generation=1, phase=phase, message="in words")
    return status.model_copy(update={"conditions": conditions_of(status, summary, NOW)}).to_json()


def in_phase(phase: Phase, reason: Reason | None = None, **spec: Any) -> dict[str, Any]:
    return job(status_in(phase, reason or REASONS[phase]), **spec)


def degraded(truth: str) -> dict[str, Any]:
    """The condition that tells how a published model does on fresh data; it comes last."""
    told = {"observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z", "reason": "Degraded", "message": "in words"}
    return {"type": "Degraded", "status": truth, **told}


STATES: dict[str, dict[str, Any]] = {
    **{phase.lower(): in_phase(phase, **({"suspend": True} if phase == "Suspended" else {})) for phase in get_args(Phase)},
    "just made": job({"observedGeneration": -1}),
    "invalid": in_phase("Failed", Reason.INVALID_SPEC),
    "gates not passed": in_phase("Failed", Reason.GATES_NOT_PASSED),
    "canceled": in_phase("Failed", Reason.CANCELED),
    "to be suspended": job(status_in("Training", Reason.TRAINING), generation=2, suspend=True),
    "to be resumed": job(status_in("Suspended", Reason.SUSPENDED), generation=2, suspend=False),
}
STATES["degraded"] = job({**STATES["complete"]["status"], "conditions": [*STATES["complete"]["status"]["conditions"], degraded("True")]})
STATES["holding"] = job({**STATES["complete"]["status"], "conditions": [*STATES["complete"]["status"]["conditions"], degraded("False")]})
_MARK = {"deletionTimestamp": "2026-01-01T00:00:00Z"}
STATES["deleting"] = {**STATES["training"], "metadata": {**STATES["training"]["metadata"], **_MARK}}
STATES["complete and deleting"] = {**STATES["complete"], "metadata": {**STATES["complete"]["metadata"], **_MARK}}
"""Name of the state to the job."""
