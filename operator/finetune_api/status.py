"""The status of a FineTuneJob: everything `kubectl get` shows stands here. Times are RFC 3339 in UTC, durations seconds, sizes bytes."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.fields import StatusModel
from finetune_api.monitoring_status import MonitoringStatus
from finetune_api.outcomes import (
    BASELINES_MAX,
    BaselineResult,
    ComparedResult,
    Difference,
    Evaluation,
    EvaluationResult,
    GateResult,
    Health,
    SearchBest,
    SearchSummary,
    Verdict,
)
from finetune_api.plan_status import MemoryParts, Plan
from finetune_api.resolved_profile import ResolvedProfile
from finetune_api.status_fields import COUNT_MAX, TEXT_MAX, Count, Name, Text, Time, Uri
from finetune_api.training_status import (
    Artifact,
    ArtifactKind,
    BestCheckpoint,
    CheckpointRef,
    Checkpoints,
    DataSummary,
    Metric,
    ModelSummary,
    Progress,
    TokenStatistics,
)

__all__ = [
    "BASELINES_MAX",
    "COUNT_MAX",
    "LOG_MAX",
    "RETRY_MAX",
    "STAGES",
    "TEXT_MAX",
    "WARNINGS_MAX",
    "WARNING_LENGTH_MAX",
    "Artifact",
    "ArtifactKind",
    "Attempt",
    "BaselineResult",
    "BestCheckpoint",
    "CheckpointRef",
    "Checkpoints",
    "ComparedResult",
    "Condition",
    "ConditionType",
    "Count",
    "DataSummary",
    "Difference",
    "Evaluation",
    "EvaluationResult",
    "Failure",
    "GateResult",
    "Health",
    "MemoryParts",
    "Metric",
    "ModelSummary",
    "MonitoringStatus",
    "Name",
    "Phase",
    "Plan",
    "Progress",
    "Resolved",
    "ResolvedProfile",
    "SearchBest",
    "SearchSummary",
    "Stage",
    "StageName",
    "StageState",
    "Status",
    "Text",
    "Time",
    "TokenStatistics",
    "Uri",
    "Usage",
    "Verdict",
    "Warnings",
]

Phase = Literal[
    "Pending",
    "Queued",
    "Preparing",
    "Baseline",
    "Searching",
    "Training",
    "Evaluating",
    "Publishing",
    "Suspended",
    "Complete",
    "Failed",
]
StageName = Literal["Prepare", "Baseline", "Search", "Train", "Evaluate", "Publish"]
LOG_MAX = 2048
"""Characters of a log that a failure holds."""
StageState = Literal["Pending", "Running", "Succeeded", "Failed"]
RETRY_MAX = 64
"""Longest value of the retry annotation that is kept as it is; as long as a SHA-256 in hexadecimal."""
WARNINGS_MAX = 8
WARNING_LENGTH_MAX = 512
Warnings = Annotated[tuple[Annotated[str, Field(max_length=WARNING_LENGTH_MAX)], ...], Field(max_length=WARNINGS_MAX)]
STAGES: tuple[StageName, ...] = ("Prepare", "Train", "Evaluate", "Publish")
"""The stages of every job; `stages_of` has those of a job that asks for more."""

ConditionType = Literal[
    "Accepted",
    "DataReady",
    "WorkersReady",
    "Trained",
    "Evaluated",
    "GatesPassed",
    "Published",
    "Complete",
    "Failed",
    "Suspended",
    "Ready",
    "Reconciling",
    "Stalled",
    "Degraded",
]


class Condition(StatusModel):
    """One fact about the job, as Kubernetes' conventions for conditions have it."""

    type: ConditionType
    """What the fact is about."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: Count
    """Generation of the spec that the fact belongs to."""
    last_transition_time: Time
    """When `status` last changed."""
    reason: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Z][A-Za-z0-9]*$")]
    """Why, as one word of the documented set."""
    message: Text = ""
    """Why, for people."""


class Failure(StatusModel):
    """Why an attempt, or a worker pod, failed."""

    stage: StageName | None = None
    """Stage in which it failed."""
    reason: Annotated[str, Field(max_length=64)]
    """Why, as one word of the documented set."""
    message: Text = ""
    """Why, for people."""
    hint: Text | None = None
    """What to change."""
    retryable: bool = False
    """Whether another attempt may help."""
    pod: Name | None = None
    """Pod that it happened in."""
    exit_code: int | None = None
    """Exit code of the pod's container."""
    log: Annotated[str, Field(max_length=LOG_MAX)] | None = None
    """The last lines of the pod's log; what looks like a secret is hidden."""


class Attempt(StatusModel):
    """The set of pods that is running the job, and how many sets there were before."""

    number: Count = 0
    """The current attempt, from 1; 0 before the first."""
    failures: Count = 0
    """Attempts that failed; backoffLimit bounds these."""
    forgiven_failures: Count = 0
    """The part of failures that backoffLimit does not count, since the job was retried afterwards."""
    preemptions: Count = 0
    """Attempts that the cluster took away; these are not bounded."""
    lost_steps: Count = 0
    """Optimiser steps that had to be done again."""
    start_time: Time | None = None
    """When the current attempt began."""
    end_time: Time | None = None
    """When the current attempt ended or was told to stop. The next one begins when its pods have gone."""
    end_reason: Annotated[str, Field(max_length=64)] | None = None
    """Why the last attempt that ended did, as one word of the documented set."""
    end_message: Text | None = None
    """Why the last attempt that ended did, for people."""
    waiting_time: Time | None = None
    """Since when the current attempt has waited for pods to run, or for its head to answer; absent while they do, or a queue holds them."""
    earlier_lost_steps: Count = 0
    """The part of lostSteps that attempts before the current one count."""
    head_seen: bool = False
    """Whether the head pod of this attempt was seen, so that its absence means that it is lost."""
    gangs: Count = 0
    """How often this attempt has come to want workers; each time they are a group of their own for a queue."""
    gang_seen: bool = False
    """Whether all workers without which the training does not go on were seen, so that the loss of one means that the group is lost."""
    retry_time: Time | None = None
    """When the next attempt may begin, after a failure."""
    worker_failure: Failure | None = None
    """How the last worker pod of this attempt that died did. Lost workers alone do not end an attempt."""

    @property
    def running(self) -> bool:
        """Whether the current attempt has begun and not ended: its objects should exist."""
        return self.number > 0 and self.end_time is None


class Stage(StatusModel):
    """One stage of the job's way."""

    name: StageName
    """Name of the stage."""
    state: StageState
    """How far it is."""
    start_time: Time | None = None
    """When it began."""
    end_time: Time | None = None
    """When it ended."""


class Resolved(StatusModel):
    """What the job's references came to, so that it can be run again."""

    model_revision: Annotated[str, Field(max_length=128)] | None = None
    """Commit of the hub model, or the digest of the model's files."""
    data_digest: Annotated[str, Field(max_length=128)] | None = None
    """Digest of the examples, after checks and in their order."""
    config_digest: Annotated[str, Field(max_length=128)] | None = None
    """Digest of everything in the spec that the result follows from."""
    trainer_image: Annotated[str, Field(max_length=512)] | None = None
    """Image that the pods run."""
    profile: ResolvedProfile | None = None
    """The TuningProfile that the job runs under, as it was when the job was first looked at; absent where it runs under none."""


class Usage(StatusModel):
    """What the job has used so far, over all attempts."""

    gpu_seconds: Annotated[float, Field(ge=0)] = 0.0
    """GPUs held, times seconds: of each pod from when it was given its node to when it ended, whether it trained or waited.
    The operator counts it by the pods' own times."""
    counted_time: Time | None = None
    """Up to when gpuSeconds is counted."""
    trained_tokens: Count = 0
    """Tokens of examples that steps were taken on."""


class Status(StatusModel):
    """Where the job stands."""

    observed_generation: int = -1
    """Generation of the spec that this status belongs to; -1 before the operator has seen the job."""
    phase: Phase | None = None
    """Summary for people; programs look at the conditions."""
    message: Text | None = None
    """Summary for people."""
    warnings: Warnings = ()
    """What the job's owner should look at although the job goes on; each is also told as an Event with the reason Warned."""
    start_time: Time | None = None
    """When the operator first acted on the job."""
    completion_time: Time | None = None
    """When the job ended."""
    suspended_time: Time | None = None
    """Since when the job has been in suspension."""
    queued_time: Time | None = None
    """Since when a queue has held back pods that are needed."""
    suspended_seconds: Count = 0
    """Time spent in earlier suspensions, in queues, and ended before a retry, which activeDeadlineSeconds does not count."""
    retry_seen: Annotated[str, Field(max_length=RETRY_MAX)] | None = None
    """Value of the annotation finetune.dev/retry that has had its effect (a long one's SHA-256); a new one retries a failed job."""
    attempt: Attempt = Attempt()
    """The current set of pods and the count of those before."""
    workers_wanted: Count = 0
    """Worker pods that the head has asked for in this attempt."""
    workers_ready: Count = 0
    """Worker pods that are ready."""
    conditions: Annotated[
        tuple[Condition, ...],
        Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = ()
    """The facts about the job."""
    stages: Annotated[tuple[Stage, ...], Field(max_length=16)] = ()
    """The stages of the job's way."""
    resolved: Resolved | None = None
    """What the job's references came to."""
    model: ModelSummary | None = None
    """The model that is tuned, counted."""
    data: DataSummary | None = None
    """The examples, counted."""
    progress: Progress | None = None
    """How far the training is."""
    metrics: Annotated[tuple[Metric, ...], Field(max_length=64)] = ()
    """The latest value of each measure."""
    checkpoints: Checkpoints | None = None
    """The saved states that matter."""
    baseline: Annotated[tuple[BaselineResult, ...], Field(max_length=BASELINES_MAX)] = ()
    """What the untuned models reach by their prompts."""
    search: SearchSummary | None = None
    """How far the search is, and the best values."""
    evaluation: Evaluation | None = None
    """The comparison of the untuned and the tuned model."""
    artifacts: Annotated[tuple[Artifact, ...], Field(max_length=16)] = ()
    """The results."""
    plan: Plan | None = None
    """With spec.planOnly: what the job would take."""
    usage: Usage | None = None
    """What the job has used so far."""
    earlier_usage: Usage | None = None
    """The part of usage that attempts before the current one count."""
    failure: Failure | None = None
    """Why the last attempt that failed did."""
    monitoring: MonitoringStatus | None = None
    """How the published model does on fresh data."""

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of that type, where it is set."""
        return next((condition for condition in self.conditions if condition.type == kind), None)

    @property
    def finished(self) -> bool:
        """Whether the job has ended, well or not."""
        return any(condition.type in ("Complete", "Failed") and condition.status == "True" for condition in self.conditions)
