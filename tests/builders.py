"""What tests are made of: jobs, pods and times, with a default for all that a test does not care about."""

import copy
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api import LABEL_ATTEMPT, LABEL_JOB_NAME, LABEL_JOB_UID, LABEL_ROLE
from finetune_api.report import Report
from finetune_api.status import STAGES, Stage, StageName, Status
from finetune_api.v1alpha1 import parse_job
from finetune_operator.observed import Job, Pod, job_from, pod_from
from finetune_operator.settings import Settings
from finetune_operator.times import rfc3339

T0 = datetime(2026, 1, 1, tzinfo=UTC)
"""When the tests' jobs begin."""
NAME, NAMESPACE, UID = "bot", "team-a", "5f7c0e2e-0000-4000-8000-000000000001"
SETTINGS = Settings(trainer_image="registry.example/trainer:1", token_key=b"a key for tests only")


class Clock:
    """A time that passes only when it is told to."""

    def __init__(self, now: datetime = T0) -> None:
        self.now = now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def at(seconds: float) -> datetime:
    """So long after T0."""
    return T0 + timedelta(seconds=seconds)


def raw_job(
    *,
    name: str = NAME,
    uid: str = UID,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    status: Status | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A FineTuneJob as the API server returns it, with every default; `spec` replaces whole parts of a small LoRA job's spec."""
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "uid": uid,
            "generation": 1,
            "resourceVersion": "1",
            "labels": dict(labels or {}),
            "annotations": dict(annotations or {}),
        },
        "spec": {
            "model": {"source": "hf://org/model"},
            "data": {"train": {"source": "pvc://data/train.jsonl"}},
            "method": {"lora": {}},
            "compute": {"workers": {"min": 2, "max": 2}},
            "output": {"storage": "pvc://models/bot"},
            **copy.deepcopy(spec),
        },
    }
    manifest["spec"] = parse_job(manifest).spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    manifest["status"] = (status or Status()).to_json()
    return manifest


def make_job(**given: Any) -> Job:
    """The same job as the decisions see it."""
    return job_from(raw_job(**given))


def raw_pod(
    role: str = "head", *, attempt: int = 1, index: int = 0, phase: str = "Running", uid: str = "", **status: Any
) -> dict[str, Any]:
    """A pod of the job as the API server returns it. `status` adds to its status; `created` and `deletion` are times."""
    name = f"{NAME}-{attempt}-head" if role == "head" else f"{NAME}-{attempt}-worker-{index}"
    meta = {
        "name": name,
        "namespace": NAMESPACE,
        "uid": uid or f"uid-of-{name}",
        "creationTimestamp": rfc3339(status.pop("created", T0)),
        "labels": {LABEL_JOB_NAME: NAME, LABEL_JOB_UID: UID, LABEL_ROLE: role, LABEL_ATTEMPT: str(attempt)},
        "ownerReferences": [{"uid": UID, "controller": True}],
    }
    if deletion := status.pop("deletion", None):
        meta["deletionTimestamp"] = rfc3339(deletion)
    if phase == "Running":
        status = {"podIP": "10.0.0.1", **status}
    return {"metadata": meta, "status": {"phase": phase, **status}}


def make_pod(role: str = "head", **given: Any) -> Pod:
    """The same pod as the decisions see it."""
    return pod_from(raw_pod(role, **given))


def terminated(code: int, reason: str = "Error", message: str = "") -> list[dict[str, Any]]:
    """containerStatuses of a pod whose container has ended."""
    return [{"name": "c", "state": {"terminated": {"exitCode": code, "reason": reason, "message": message}}}]


def stages(now: StageName, *, ended: bool = False) -> tuple[Stage, ...]:
    """The stages of a job that is in one of them, or has just ended it."""
    index = STAGES.index(now)
    done = tuple(Stage(name=name, state="Succeeded") for name in STAGES[:index])
    return (*done, Stage(name=now, state="Succeeded" if ended else "Running"))


def make_report(stage: StageName = "Train", *, attempt: int = 1, **given: Any) -> Report:
    """A report of the job's head in some stage, which wants two workers where the stage does."""
    wanted = 2 if stage in ("Train", "Evaluate") else 0
    return Report(
        **{"job_uid": UID, "attempt": attempt, "stages": stages(stage), "workers_wanted": wanted, "message": f"in {stage}", **given}
    )
