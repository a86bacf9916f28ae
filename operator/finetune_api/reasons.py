"""The closed set of reasons: the same words in conditions, Events, metrics and docs."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a job, a condition or an Event is as it is."""

    # The way of a job that goes well.
    ACCEPTED = "Accepted"
    PENDING = "Pending"
    QUEUED = "Queued"
    PREPARING = "Preparing"
    MEASURING_BASELINE = "MeasuringBaseline"
    SEARCHING = "Searching"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    SUCCEEDED = "Succeeded"
    BASELINE_SUFFICIENT = "BaselineSufficient"
    GATES_PASSED = "GatesPassed"
    PLANNED = "Planned"
    QUALITY_HELD = "QualityHeld"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    RETRYING = "Retrying"
    WARNED = "Warned"
    PAUSED = "Paused"
    # What the user must change.
    PROFILE_VIOLATED = "ProfileViolated"
    PROFILE_NOT_FOUND = "ProfileNotFound"
    INVALID_SPEC = "InvalidSpec"
    DATASET_INVALID = "DatasetInvalid"
    DATASET_NOT_FOUND = "DatasetNotFound"
    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_INVALID = "ModelInvalid"
    UNSAFE_MODEL_FORMAT = "UnsafeModelFormat"
    AUTHENTICATION_FAILED = "AuthenticationFailed"
    SECRET_NOT_FOUND = "SecretNotFound"  # noqa: S105 - a reason, not a secret
    CONFIG_MAP_NOT_FOUND = "ConfigMapNotFound"
    VOLUME_CLAIM_NOT_FOUND = "VolumeClaimNotFound"
    CHECKPOINT_INCOMPATIBLE = "CheckpointIncompatible"
    TRAINING_DIVERGED = "TrainingDiverged"
    KNOWLEDGE_BASE_INVALID = "KnowledgeBaseInvalid"
    COMPARISON_NOT_FOUND = "ComparisonNotFound"
    SEARCH_FAILED = "SearchFailed"
    GATES_NOT_PASSED = "GatesNotPassed"
    GATES_INCONCLUSIVE = "GatesInconclusive"
    DEGRADED = "Degraded"
    # What the platform must change.
    TEACHER_UNAVAILABLE = "TeacherUnavailable"
    GENERATOR_UNAVAILABLE = "GeneratorUnavailable"
    JUDGE_UNAVAILABLE = "JudgeUnavailable"
    ENDPOINT_UNAVAILABLE = "EndpointUnavailable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    UNSCHEDULABLE = "Unschedulable"
    FORBIDDEN = "Forbidden"
    STORAGE_FULL = "StorageFull"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    OUT_OF_MEMORY = "OOMKilled"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    SHARED_MEMORY_FULL = "SharedMemoryFull"
    GPU_OUT_OF_MEMORY = "GPUOutOfMemory"
    GPU_HARDWARE_ERROR = "GPUHardwareError"
    GPU_UNAVAILABLE = "GPUUnavailable"
    GPU_KERNEL_FAILED = "GPUKernelFailed"
    QUOTA_EXCEEDED = "QuotaExceeded"
    ADMISSION_DENIED = "AdmissionDenied"
    CONTAINER_START_FAILED = "ContainerStartFailed"
    # What the cluster did.
    PREEMPTED = "Preempted"
    EVICTED = "Evicted"
    NODE_LOST = "NodeLost"
    NODE_REJECTED = "NodeRejected"
    HEAD_LOST = "HeadLost"
    WORKERS_LOST = "WorkersLost"
    COMMUNICATION_FAILED = "CommunicationFailed"
    NCCL_HANG = "NCCLHang"
    NO_PROGRESS = "NoProgress"
    # What somebody decided.
    CANCELED = "Canceled"
    # Limits of the spec.
    PRE_RUNNING_DEADLINE_EXCEEDED = "PreRunningDeadlineExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    BUDGET_EXCEEDED = "BudgetExceeded"
    # What we must change.
    CHECKPOINT_CORRUPTED = "CheckpointCorrupted"
    EVALUATION_FAILED = "EvaluationFailed"
    PUBLISH_FAILED = "PublishFailed"
    PROCESS_CRASHED = "ProcessCrashed"
    INTERNAL_ERROR = "InternalError"


MEANINGS: dict[Reason, str] = {
    Reason.ACCEPTED: "The spec can be run, and the first attempt begins.",
    Reason.PENDING: "What the message names is to come: the head pod, the workers, a place in a queue, or a stage.",
    Reason.QUEUED: "A queue holds the workers back until there is room for them; the message names the gates.",
    Reason.PREPARING: "The head checks the storage, the model and the data, and tokenises the data.",
    Reason.MEASURING_BASELINE: "The workers answer with the untuned model, as each of baseline.prompts asks it.",
    Reason.SEARCHING: "The workers try other values, as search says.",
    Reason.TRAINING: "The workers train, or wait for one another.",
    Reason.EVALUATING: "The workers measure the trained model on what it was not trained on.",
    Reason.PUBLISHING: "The head puts the result into output.storage.",
    Reason.SUCCEEDED: "The result, or that of the stage, is there.",
    Reason.BASELINE_SUFFICIENT: "A prompt alone reached baseline.sufficientIf: nothing was trained or published; see status.baseline.",
    Reason.GATES_PASSED: "The tuned model passed every gate of evaluation.gates.",
    Reason.PLANNED: "spec.planOnly: model and data are checked, and status.plan tells what the training would take; nothing was trained.",
    Reason.QUALITY_HELD: "On fresh data the published model is not worse than when it was released, as far as monitoring.degradedIf asks.",
    Reason.SUSPENDED: "spec.suspend is set: the pods save a checkpoint and go. Set it to false to go on.",
    Reason.RESUMED: "spec.suspend is unset: a new attempt goes on from the last checkpoint.",
    Reason.RETRYING: "An attempt has ended for the reason that the message names, and another one follows it.",
    Reason.WARNED: "The job runs; the message says what its owner should know of it.",
    Reason.PAUSED: "The annotation finetune.dev/reconcile is disabled: the operator does nothing for the job until it is removed.",
}
"""What the reasons of a job say with which nothing is wrong."""


@dataclass(frozen=True)
class Advice:
    """Whether another attempt may help, and what to do. Why it came about, and how one finds out, stands in `reason_pages`."""

    retryable: bool
    hint: str


ADVICE: dict[Reason, Advice] = {
    Reason.PROFILE_VIOLATED: Advice(
        False,
        "The job asks for what its TuningProfile does not allow: change what the message names, or name another profile "
        "(kubectl get tuningprofiles), and apply the job under a new name.",
    ),
    Reason.PROFILE_NOT_FOUND: Advice(
        True,
        "The job waits for the TuningProfile that the message names: create it, or apply the job under a new name with another profileRef.",
    ),
    Reason.INVALID_SPEC: Advice(False, "Correct the field that the message names and apply the job under a new name."),
    Reason.DATASET_INVALID: Advice(
        False, "Correct the rows that the message names, or set data.format and data.columns to what the file holds."
    ),
    Reason.DATASET_NOT_FOUND: Advice(False, "Check the source that the message names: the path, the bucket or the data set's name."),
    Reason.MODEL_NOT_FOUND: Advice(
        False, "Check source and revision of the model that the message names: the base model, the teacher, or one of the closed loop."
    ),
    Reason.MODEL_INVALID: Advice(
        False,
        "The model, or the teacher where the message names it, must be a causal language model that transformers knows, with its tokenizer "
        "and undamaged weights.",
    ),
    Reason.UNSAFE_MODEL_FORMAT: Advice(False, "Only safetensors are loaded: convert the model's weights first."),
    Reason.AUTHENTICATION_FAILED: Advice(
        False, "Check the Secret that secretRef names: its keys, and what its owner may read. An endpoint's 401 and 403 are this, too."
    ),
    Reason.SECRET_NOT_FOUND: Advice(False, "Create the Secret in the job's namespace, or correct secretRef.name."),
    Reason.CONFIG_MAP_NOT_FOUND: Advice(False, "Create the ConfigMap with that key in the job's namespace, or correct configMap.name."),
    Reason.VOLUME_CLAIM_NOT_FOUND: Advice(False, "Create the PersistentVolumeClaim in the job's namespace, or correct the pvc:// URI."),
    Reason.CHECKPOINT_INCOMPATIBLE: Advice(
        False, "The checkpoints in output.storage belong to another method or model: use another output.storage."
    ),
    Reason.TRAINING_DIVERGED: Advice(
        False, "Lower training.learningRate, raise training.warmupRatio, or look for broken rows in the data."
    ),
    Reason.KNOWLEDGE_BASE_INVALID: Advice(
        False,
        "A knowledgeBase must hold txt, md, html or jsonl files in UTF-8 with some text in them: see the file that the message names.",
    ),
    Reason.COMPARISON_NOT_FOUND: Advice(
        False,
        "evaluation.compareWith names measured jobs with the same output.storage: correct the name, or wait for that job.",
    ),
    Reason.SEARCH_FAILED: Advice(
        False, "No trial of the search came to its end: see the message for what the last one failed of, and narrow search.parameters."
    ),
    Reason.GATES_NOT_PASSED: Advice(
        False,
        "The tuned model is not good enough, so nothing is published: see status.evaluation.gates. With onGateFailure hold its artifacts "
        "are kept aside in output.storage. Improve the data or the training, or apply a job with other gates.",
    ),
    Reason.GATES_INCONCLUSIVE: Advice(
        False,
        "The examples are too few to tell whether a gate is passed, so nothing is published: give its suite more examples, raise its "
        "limit, or lower evaluation.confidence.",
    ),
    Reason.DEGRADED: Advice(
        False,
        "On fresh data the published model is worse than when it was released: see status.monitoring.results. Nothing is trained by "
        "itself: look at the fresh examples, and apply a new job with newer data where it is to learn from them.",
    ),
    Reason.TEACHER_UNAVAILABLE: Advice(
        True,
        "The teacher's storage or endpoint does not answer, or not as it should: check that it runs, and the endpoint's url and model.",
    ),
    Reason.GENERATOR_UNAVAILABLE: Advice(
        True,
        "The generator's storage or endpoint does not answer, or not as it should: check that it runs, and the endpoint's url and model.",
    ),
    Reason.JUDGE_UNAVAILABLE: Advice(
        True, "The judge's endpoint does not answer, or not as it should: check that it runs, and its url and model."
    ),
    Reason.ENDPOINT_UNAVAILABLE: Advice(
        True,
        "The endpoint of monitoring does not answer, or not as it should: check that it runs, its url and model. The next run comes on "
        "schedule.",
    ),
    Reason.IMAGE_PULL_FAILED: Advice(True, "Check the trainer image of the operator's settings and the cluster's access to its registry."),
    Reason.UNSCHEDULABLE: Advice(
        True, "No node has what compute.resourcesPerWorker, compute.nodeSelector and compute.tolerations ask for: ask for less, or wait."
    ),
    Reason.FORBIDDEN: Advice(True, "The cluster refused an object of this job: have the operator's role grant what the message names."),
    Reason.QUOTA_EXCEEDED: Advice(
        True,
        "The namespace's quota is used up: lower compute.resourcesPerWorker or compute.workers, end other jobs, or have the ResourceQuota "
        "that the message names raised.",
    ),
    Reason.ADMISSION_DENIED: Advice(
        True, "A policy of the cluster refused a pod or another object of this job: see the message for its name, and ask who owns it."
    ),
    Reason.CONTAINER_START_FAILED: Advice(
        True,
        "The container could not be started: check the trainer image of the operator's settings (its architecture, its python), the node's "
        "container runtime, and what the cluster adds to pods.",
    ),
    Reason.STORAGE_FULL: Advice(True, "Free or add space on the volume of output.storage, or lower checkpoint.keep."),
    Reason.STORAGE_UNAVAILABLE: Advice(True, "Check that output.storage can be written to from the job's namespace."),
    Reason.OUT_OF_MEMORY: Advice(
        True, "Raise memory in compute.resourcesPerWorker, or lower training.microBatchSize or maxSequenceLength."
    ),
    Reason.HOST_OUT_OF_MEMORY: Advice(
        True,
        "A process could not have the memory that it asked for: raise memory in compute.resourcesPerWorker (the head's is the platform's "
        "setting FINETUNE_HEAD_MEMORY), or lower training.maxSequenceLength.",
    ),
    Reason.SHARED_MEMORY_FULL: Advice(
        True,
        "The shared memory (/dev/shm) is full, or a mapped file lost what it was mapped from: use fewer GPUs for each worker in "
        "compute.resourcesPerWorker, and check the volumes that the job reads.",
    ),
    Reason.GPU_OUT_OF_MEMORY: Advice(
        True, "Lower training.microBatchSize or maxSequenceLength, use method.lora, or shard with compute.strategy fsdp."
    ),
    Reason.GPU_HARDWARE_ERROR: Advice(
        True, "A GPU is broken: have its node cordoned and the GPU reset or replaced, or keep the job off it with compute.nodeSelector."
    ),
    Reason.GPU_UNAVAILABLE: Advice(
        True,
        "The container has no usable GPU: ask for one in compute.resourcesPerWorker (nvidia.com/gpu), and have the node's driver and its "
        "device plugin checked; the driver must be as new as the trainer image's CUDA asks for.",
    ),
    Reason.GPU_KERNEL_FAILED: Advice(
        True,
        "A program on the GPU failed: mostly a token that the model's embedding does not have, or a defect of a kernel. Try "
        "training.precision float32; where other jobs fail on the same node, its GPU is broken.",
    ),
    Reason.PREEMPTED: Advice(True, "The cluster took the pods away; the job goes on from its last checkpoint."),
    Reason.EVICTED: Advice(
        True,
        "The node was short of memory, disk or processes, and the pod had to go; the job goes on from its last checkpoint. Raise memory in "
        "compute.resourcesPerWorker to what is really used, so that the pod is among the last to be chosen.",
    ),
    Reason.NODE_LOST: Advice(
        True, "The node went away or does not answer; the job goes on from its last checkpoint. Where one node is lost often, look at it."
    ),
    Reason.NODE_REJECTED: Advice(
        True,
        "The node that was chosen would not take the pod, since what it had offered was gone; the pod is made anew. Where that goes on, "
        "look at the node's device plugin.",
    ),
    Reason.HEAD_LOST: Advice(True, "The head pod went without a word; the job goes on from its last checkpoint."),
    Reason.WORKERS_LOST: Advice(True, "Worker pods kept dying; look at their logs and at the nodes they ran on."),
    Reason.COMMUNICATION_FAILED: Advice(
        True,
        "The workers cannot talk to each other (NCCL): check the NetworkPolicies, the network between the nodes, and that their drivers "
        "are the same; compute.nodeSelector keeps the workers on nodes of one kind.",
    ),
    Reason.NCCL_HANG: Advice(
        True,
        "The workers waited for one of them too long: see which rank the message names, and look at its pod and its node. The job goes on "
        "from its last checkpoint.",
    ),
    Reason.NO_PROGRESS: Advice(
        True,
        "The training took no step for progressDeadlineSeconds: look at the workers' pods and at the storage that they write to; raise "
        "progressDeadlineSeconds where a single step takes that long.",
    ),
    Reason.CANCELED: Advice(
        False, "Remove the annotation finetune.dev/cancel and set finetune.dev/retry to a new value to go on from the last checkpoint."
    ),
    Reason.PRE_RUNNING_DEADLINE_EXCEEDED: Advice(
        False,
        "The pods never ran, or the operator could not reach the head: see the message, then ask for less, raise "
        "preRunningDeadlineSeconds, or let the operator's namespace reach the head's port (8000).",
    ),
    Reason.DEADLINE_EXCEEDED: Advice(
        False,
        "Raise activeDeadlineSeconds, lower training.epochs, or use more workers. A measuring run that did not hang takes less time on "
        "fewer examples (limit in monitoring.suites).",
    ),
    Reason.BACKOFF_LIMIT_EXCEEDED: Advice(False, "Every attempt failed: see status.failure for the last one's reason."),
    Reason.BUDGET_EXCEEDED: Advice(
        True,
        "The job has used its GPU-hours and stopped at a checkpoint: raise or remove maxGpuHours, and it goes on from there.",
    ),
    Reason.CHECKPOINT_CORRUPTED: Advice(True, "Every checkpoint is damaged; they were set aside and the training begins anew."),
    Reason.EVALUATION_FAILED: Advice(True, "The trained model could not be measured; see the head pod's log."),
    Reason.PUBLISH_FAILED: Advice(True, "The result could not be written to output.storage; see the message."),
    Reason.PROCESS_CRASHED: Advice(
        True,
        "Native code crashed (a library, a driver, or an instruction that the CPU does not have): see the last lines of the log, and try "
        "another node with compute.nodeSelector.",
    ),
    Reason.INTERNAL_ERROR: Advice(True, "This is a defect of the trainer or the operator; please report it with the head pod's log."),
}
