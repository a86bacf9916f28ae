"""FineTuneJob v1alpha1: what a user may ask for. The docstring of each field is its description in the CRD and in `kubectl explain`.

A rule that needs more than one field stands twice, side by side: as CEL for `kubectl apply`, as a validator for everyone else.
A shared corpus of manifests (tests/data/jobs) proves that both give the same verdict.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from finetune_api import JOB_NAME_MAX
from finetune_api.as_stored import as_stored
from finetune_api.baseline import BaselinePlan
from finetune_api.compute import Compute, Toleration, Workers
from finetune_api.data import Data, HeldOutSource
from finetune_api.evaluation import NOT_BESIDE_ITSELF, EvaluationPlan, Gate, Suite
from finetune_api.fields import JOB_NAME_PATTERN, LOCAL_RUN, LabelKey, LabelValue, SpecModel, check, described, rule, rules
from finetune_api.loop_rules import LOOP_RULES
from finetune_api.methods import (
    WHOLE_MODEL_METHODS,
    AdapterMethod,
    FreezeMethod,
    FullMethod,
    Ia3Method,
    LoraMethod,
    Method,
    PrefixTuningMethod,
    PromptTuningMethod,
    PTuningMethod,
)
from finetune_api.monitoring import MonitoringPlan
from finetune_api.objectives import (
    DistillationObjective,
    DpoObjective,
    FeatureForm,
    LayerPair,
    Objective,
    RelationForm,
    ResponseForm,
    SftObjective,
    Teacher,
)
from finetune_api.preparation import ContentPoints, Generator, KnowledgeBase, Preparation, Questions, Retriever
from finetune_api.search import SearchPlan
from finetune_api.sources import (
    ConfigMapSource,
    DataSource,
    Endpoint,
    ModelReference,
    ModelSource,
    Output,
    ProfileReference,
    SecretReference,
)
from finetune_api.status import STAGES, ArtifactKind, StageName, Status
from finetune_api.training import Checkpoint, EarlyStopping, Training

__all__ = [
    "AdapterMethod",
    "ArtifactKind",
    "BaselinePlan",
    "Checkpoint",
    "Compute",
    "ConfigMapSource",
    "ContentPoints",
    "Data",
    "DataSource",
    "DistillationObjective",
    "DpoObjective",
    "EarlyStopping",
    "Endpoint",
    "EvaluationPlan",
    "FeatureForm",
    "FineTuneJob",
    "FreezeMethod",
    "FullMethod",
    "Gate",
    "Generator",
    "HeldOutSource",
    "Ia3Method",
    "KnowledgeBase",
    "LayerPair",
    "LoraMethod",
    "Method",
    "ModelReference",
    "ModelSource",
    "MonitoringPlan",
    "ObjectMeta",
    "Objective",
    "Output",
    "PTuningMethod",
    "PrefixTuningMethod",
    "Preparation",
    "ProfileReference",
    "PromptTuningMethod",
    "Questions",
    "RelationForm",
    "ResponseForm",
    "Retriever",
    "SearchPlan",
    "SecretReference",
    "SftObjective",
    "Spec",
    "Suite",
    "Teacher",
    "Toleration",
    "Training",
    "Workers",
    "parse_job",
    "stages_of",
]


def _immutable(*names: str) -> list[dict[str, str]]:
    """A spec says what ran, so it does not change; only what steers the run does."""
    return [rule(f"self.{name} == oldSelf.{name}", f"{name} is immutable") for name in names]


def _immutable_where_set(*names: str) -> list[dict[str, str]]:
    """The same for fields that a spec may be without."""
    return [
        rule(f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})", f"{name} is immutable")
        for name in names
    ]


def _raised_or_removed(*names: str) -> list[dict[str, str]]:
    """Limits that a spec may be without: a running job's are never made tighter."""
    return [
        rule(f"!has(self.{name}) || (has(oldSelf.{name}) && self.{name} >= oldSelf.{name})", f"{name} can only be raised or removed")
        for name in names
    ]


_A_SEQUENCE_FOR_EACH_WORKER = rule(
    "self.training.globalBatchSize >= self.compute.workers.max",
    "training.globalBatchSize must not be smaller than compute.workers.max: every worker needs a sequence",
)
_QUANTIZED_NEEDS_GPU = rule(
    "has(self.profileRef) || self.model.quantization == 'none' || self.compute.resourcesPerWorker.exists(name, "
    "name.endsWith('/gpu') && string(self.compute.resourcesPerWorker[name]).matches('[1-9]'))",
    "model.quantization needs a GPU: ask for one in compute.resourcesPerWorker, such as nvidia.com/gpu: 1",
)
_QUANTIZED_STAYS_FROZEN = rule(
    "self.model.quantization == 'none' || (!has(self.method.full) && !has(self.method.freeze))",
    "model.quantization does not go with method.full or method.freeze, which train the model's own weights",
)
_QUANTIZED_IS_NOT_MERGED = rule(
    "self.model.quantization == 'none' || !has(self.output.artifacts) || !('merged' in self.output.artifacts)",
    "model.quantization does not go with the artifact merged, which would lose precision: merge the adapter into the whole base model",
)
_QUANTIZED_IS_NOT_SHARDED = rule(
    "self.model.quantization == 'none' || self.compute.strategy != 'fsdp'",
    "model.quantization does not go with compute.strategy fsdp: packed weights are not sharded; leave the strategy out",
)
_PISSA_NEEDS_WHOLE_WEIGHTS = rule(
    "!has(self.method.lora) || self.method.lora.variant != 'pissa' || "
    "(self.model.quantization == 'none' && self.compute.strategy != 'fsdp')",
    "method.lora.variant pissa splits whole weights: it goes with neither model.quantization nor compute.strategy fsdp",
)
_STORAGE_IS_KNOWN = rule(
    "has(self.profileRef) || has(self.output.storage)",
    "output.storage must be set, or profileRef name a profile that offers one",
)
_DPO_NEEDS_PREFERENCES = rule(
    "has(self.objective.dpo) ? self.data.format in ['auto', 'preference'] : self.data.format != 'preference'",
    "data.format preference goes with objective.dpo, and objective.dpo with data.format preference or auto",
)
_EXAMPLES_NEED_PACKING = rule(
    "self.training.packing || !has(self.objective.distillation) || !has(self.objective.distillation.relation) || "
    "!('examples' in self.objective.distillation.relation.between)",
    "objective.distillation.relation between examples needs training.packing: the examples of a packed row are compared",
)
_ARTIFACTS_FIT_METHOD = (
    rule(
        "!has(self.output.artifacts) || !('merged' in self.output.artifacts) || has(self.method.lora) || has(self.method.ia3)",
        "the artifact merged goes with method.lora and method.ia3",
    ),
    rule(
        "!has(self.output.artifacts) || !('model' in self.output.artifacts) || has(self.method.full) || has(self.method.freeze)",
        "the artifact model goes with method.full and method.freeze; ask for adapter or merged",
    ),
    rule(
        "!has(self.output.artifacts) || !('adapter' in self.output.artifacts) || (!has(self.method.full) && !has(self.method.freeze))",
        "the artifact adapter does not go with method.full and method.freeze; ask for model",
    ),
)


class Spec(SpecModel):
    """What to tune, how, on what, and where the result goes."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *_immutable("model", "data", "method", "objective", "training", "checkpoint", "compute", "output"),
            *_immutable("evaluation", "backoffLimit", "planOnly"),
            *_immutable_where_set("baseline", "search", "profileRef"),
            rule("self.preRunningDeadlineSeconds >= oldSelf.preRunningDeadlineSeconds", "preRunningDeadlineSeconds can only be raised"),
            rule("self.progressDeadlineSeconds >= oldSelf.progressDeadlineSeconds", "progressDeadlineSeconds can only be raised"),
            _A_SEQUENCE_FOR_EACH_WORKER,
            _QUANTIZED_NEEDS_GPU,
            _QUANTIZED_STAYS_FROZEN,
            _QUANTIZED_IS_NOT_MERGED,
            _QUANTIZED_IS_NOT_SHARDED,
            _PISSA_NEEDS_WHOLE_WEIGHTS,
            _STORAGE_IS_KNOWN,
            _DPO_NEEDS_PREFERENCES,
            _EXAMPLES_NEED_PACKING,
            *_ARTIFACTS_FIT_METHOD,
            *(rule(entry.cel, entry.message) for entry in LOOP_RULES),
            *_raised_or_removed("activeDeadlineSeconds", "maxGpuHours"),
        )
    )

    model: ModelSource
    """The base model."""
    data: Data
    """The examples."""
    method: Method
    """How the weights change: exactly one of full, freeze, lora, adapter, ia3, promptTuning, prefixTuning, pTuning."""
    objective: Objective = Objective(sft=SftObjective())
    """What is minimised: exactly one of sft, distillation, dpo."""
    training: Training = Training()
    """The course of the training."""
    checkpoint: Checkpoint = Checkpoint()
    """How often the state of the training is saved."""
    compute: Compute = Compute()
    """The workers that train."""
    baseline: BaselinePlan | None = None
    """Prompts for the untuned model that are measured before the training; absent measures it as it is asked anyway."""
    search: SearchPlan | None = None
    """Trials of other values before the training; absent trains with the spec's own."""
    evaluation: EvaluationPlan = EvaluationPlan()
    """How the tuned model is measured, and what it must reach to be published."""
    output: Output = Output()
    """Where checkpoints and results go. storage must be set, here or by the profile that profileRef names."""
    profile_ref: ProfileReference | None = None
    """The platform's TuningProfile whose defaults and limits hold; absent is the default profile, where the cluster has one."""
    monitoring: MonitoringPlan | None = None
    """How the published model is measured again after its release; it can be added, changed and removed at any time."""
    suspend: bool = False
    """True takes the pods away after a checkpoint; false goes on from there."""
    plan_only: bool = False
    """Check model and data, count, and tell in status.plan what the training would take; nothing is trained, and no worker is asked for."""
    max_gpu_hours: Annotated[float, Field(gt=0, le=1e7)] | None = None
    """GPU-hours (status.usage.gpuSeconds / 3600) after which the job is suspended at a checkpoint, with the reason BudgetExceeded;
    it goes on when this is raised or removed. Absent sets no limit."""
    backoff_limit: Annotated[int, Field(ge=0, le=100)] = 3
    """Failed attempts that are tried again. Preemptions do not count."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31536000)] | None = None
    """Longest time from the start of the job to its end; time in suspension does not count."""
    pre_running_deadline_seconds: Annotated[int, Field(ge=1, le=31536000)] = 1800
    """Longest time that an attempt waits for its pods to run, and for the first answer of its head."""
    progress_deadline_seconds: Annotated[int, Field(ge=1, le=31536000)] = 1800
    """Longest time between two steps of the training, or ten times what a step takes where that is longer; then the attempt has failed."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=315360000)] | None = None
    """The job is deleted this long after its end; absent keeps it. Its artifacts stay."""

    @model_validator(mode="after")
    def _a_sequence_for_each_worker(self) -> Self:
        check(self.training.global_batch_size >= self.compute.workers.max, _A_SEQUENCE_FOR_EACH_WORKER["message"])
        return self

    @model_validator(mode="after")
    def _quantized_fits(self) -> Self:
        if self.model.quantization != "none":
            devices = {name: amount for name, amount in self.compute.resources_per_worker.items() if name.endswith("/gpu")}
            known = self.profile_ref is not None or any(int(amount) > 0 for amount in devices.values())
            check(known, _QUANTIZED_NEEDS_GPU["message"])
            check(self.method.chosen not in WHOLE_MODEL_METHODS, _QUANTIZED_STAYS_FROZEN["message"])
            check("merged" not in self.artifacts, _QUANTIZED_IS_NOT_MERGED["message"])
            check(self.compute.strategy != "fsdp", _QUANTIZED_IS_NOT_SHARDED["message"])
        return self

    @model_validator(mode="after")
    def _storage_is_known(self) -> Self:
        check(self.profile_ref is not None or self.output.storage is not None, _STORAGE_IS_KNOWN["message"])
        return self

    @model_validator(mode="after")
    def _weights_are_whole(self) -> Self:
        if self.method.lora is not None and self.method.lora.variant == "pissa":
            check(self.model.quantization == "none" and self.compute.strategy != "fsdp", _PISSA_NEEDS_WHOLE_WEIGHTS["message"])
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        fitting = ("auto", "preference") if self.objective.dpo else ("auto", "messages", "promptCompletion", "text")
        check(self.data.format in fitting, _DPO_NEEDS_PREFERENCES["message"])
        relation = self.objective.distillation and self.objective.distillation.relation
        between = relation.between if relation else ()
        check(self.training.packing or "examples" not in between, _EXAMPLES_NEED_PACKING["message"])
        return self

    @model_validator(mode="after")
    def _artifacts_fit_method(self) -> Self:
        merged, model, adapter = (entry["message"] for entry in _ARTIFACTS_FIT_METHOD)
        whole = self.method.chosen in WHOLE_MODEL_METHODS
        check("merged" not in self.artifacts or self.method.chosen in ("lora", "ia3"), merged)
        check("model" not in self.artifacts or whole, model)
        check("adapter" not in self.artifacts or not whole, adapter)
        return self

    @model_validator(mode="after")
    def _loop_fits(self) -> Self:
        for entry in LOOP_RULES:
            check(entry.holds(self), entry.message)
        return self

    @property
    def teacher(self) -> Teacher | None:
        """The model that is learned from, where there is one."""
        return self.objective.distillation.teacher if self.objective.distillation else None

    @property
    def artifacts(self) -> tuple[ArtifactKind, ...]:
        """Kinds of results to publish: those that output.artifacts names, else what the method makes."""
        made: ArtifactKind = "model" if self.method.chosen in WHOLE_MODEL_METHODS else "adapter"
        return self.output.artifacts or (made,)


def stages_of(spec: Spec) -> tuple[StageName, ...]:
    """The stages of such a job, in their order: Baseline and Search only where the spec asks for them, a plan's no more than the first."""
    if spec.plan_only:
        return STAGES[:1]
    asked: dict[StageName, bool] = {"Baseline": spec.baseline is not None, "Search": spec.search is not None}
    return (STAGES[0], *(name for name, wanted in asked.items() if wanted), *STAGES[1:])


_JOB_NAME = f"a letter, then letters, digits and inner hyphens, all in lower case, at most {JOB_NAME_MAX} characters"


class ObjectMeta(BaseModel):
    """The part of a Kubernetes object's metadata that this project reads."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)

    name: Annotated[str, Field(min_length=1, max_length=JOB_NAME_MAX, pattern=JOB_NAME_PATTERN), described(_JOB_NAME)]
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[LabelKey, LabelValue] = {}
    annotations: dict[str, str] = {}


class FineTuneJob(BaseModel):
    """A language model to tune: from a base model and examples to a measured result."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, json_schema_extra=rules(NOT_BESIDE_ITSELF))

    api_version: Annotated[Literal["finetune.dev/v1alpha1"], Field(alias="apiVersion")]
    kind: Literal["FineTuneJob"]
    metadata: ObjectMeta
    spec: Spec
    status: Status = Status()

    @model_validator(mode="after")
    def _not_beside_itself(self) -> Self:
        check(self.metadata.name not in self.spec.evaluation.other_jobs, NOT_BESIDE_ITSELF["message"])
        return self


def parse_job(manifest: Mapping[str, Any], *, local: bool = False) -> FineTuneJob:
    """A manifest as the API server would store it: checked, with every default in place.

    `local` also allows `file://` sources. Raises pydantic.ValidationError naming each field at fault.
    """
    text = json.dumps(as_stored(manifest, FineTuneJob))
    return FineTuneJob.model_validate_json(text, by_alias=True, by_name=False, context=LOCAL_RUN if local else None)
