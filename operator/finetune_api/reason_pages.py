"""Why each failure comes about and how one finds out: with `reasons.ADVICE` the pages of docs/reasons.md and of `finetune explain`.

In a command NAMESPACE, JOB and ATTEMPT stand for the job's own; NODE, CLAIM and the like for what the message names.
"""

from dataclasses import dataclass

from finetune_api import LABEL_JOB_NAME, LABEL_ROLE
from finetune_api.reasons import ADVICE, MEANINGS, Reason

_GET = "kubectl -n NAMESPACE get"
_OF_JOB = f"-l {LABEL_JOB_NAME}=JOB"
FAILURE = f"{_GET} finetunejob JOB -o jsonpath='{{.status.failure}}'"
DATA = f"{_GET} finetunejob JOB -o jsonpath='{{.status.data}}'"
EVALUATION = f"{_GET} finetunejob JOB -o jsonpath='{{.status.evaluation}}'"
SPEC = f"{_GET} finetunejob JOB -o yaml"
PROFILES = "kubectl get tuningprofiles"
PODS = f"{_GET} pods {_OF_JOB} -o wide"
DESCRIBE = f"kubectl -n NAMESPACE describe pods {_OF_JOB}"
EVENTS = f"{_GET} events --sort-by=.lastTimestamp"
HEAD_LOG = "kubectl -n NAMESPACE logs JOB-ATTEMPT-head --tail=100"
WORKER_LOG = f"kubectl -n NAMESPACE logs {_OF_JOB},{LABEL_ROLE}=worker --prefix --tail=100"
NODE = "kubectl describe node NODE"
CLAIMS = f"{_GET} persistentvolumeclaims"
CLAIM = "kubectl -n NAMESPACE describe persistentvolumeclaim CLAIM"
QUOTA = "kubectl -n NAMESPACE describe resourcequota"
TOP = f"kubectl -n NAMESPACE top pods {_OF_JOB} --containers"
OPERATOR_LOG = "kubectl -n finetune-system logs deployment/finetune-operator --tail=200"


@dataclass(frozen=True)
class Page:
    """What is to be known of a failure beside its Advice."""

    cause: str
    check: tuple[str, ...]
    """Commands, the most telling one first."""


PAGES: dict[Reason, Page] = {
    # What the user must change.
    Reason.INVALID_SPEC: Page(
        "The spec breaks a rule that the API server could not check, or was stored by an older CRD.",
        ("finetune validate JOB.yaml", FAILURE),
    ),
    Reason.PROFILE_VIOLATED: Page(
        "The job asks for more than its TuningProfile allows: a source that is not on its list, a method, a number of workers or GPUs, a "
        "longer time, a toleration, a label of nodes, a queue; or for code of its model's without the profile's consent. Or the head found "
        "that the key endpoint of an S3 Secret names a server that is not in allow.s3Endpoints.",
        (FAILURE, PROFILES),
    ),
    Reason.PROFILE_NOT_FOUND: Page(
        "The job names a TuningProfile that the cluster does not have, or it names none where the platform wants one. It goes on by itself "
        "when the profile appears.",
        (PROFILES, SPEC),
    ),
    Reason.DATASET_INVALID: Page(
        "Rows of the data cannot be read as examples, too many were left out, or none were left. Found before a GPU was asked for.",
        (FAILURE, DATA, HEAD_LOG),
    ),
    Reason.DATASET_NOT_FOUND: Page("There is nothing at the data's source: no file, no object, no data set of that name.", (FAILURE, SPEC)),
    Reason.MODEL_NOT_FOUND: Page("There is no model at the source, or not in that revision.", (FAILURE, SPEC)),
    Reason.MODEL_INVALID: Page(
        "What is at the model's source cannot be used: another kind of model, files that are damaged or missing, or a loss that is no "
        "number.",
        (FAILURE, HEAD_LOG),
    ),
    Reason.UNSAFE_MODEL_FORMAT: Page("The weights are pickled (.bin, .pt): loading them could run anybody's code.", (FAILURE,)),
    Reason.AUTHENTICATION_FAILED: Page(
        "A hub, an object store or an endpoint did not accept the credentials, or there were none: a wrong, expired or missing token, or "
        "no right to read (write, for output.storage) what was asked for.",
        (FAILURE, "kubectl -n NAMESPACE describe secret SECRET", HEAD_LOG),
    ),
    Reason.SECRET_NOT_FOUND: Page(
        "A Secret that the spec names, or a key of it, is not in the job's namespace.", (f"{_GET} secrets", DESCRIBE)
    ),
    Reason.CONFIG_MAP_NOT_FOUND: Page(
        "A ConfigMap that the spec names, or a key of it, is not in the job's namespace.", (f"{_GET} configmaps", DESCRIBE)
    ),
    Reason.VOLUME_CLAIM_NOT_FOUND: Page(
        "A PersistentVolumeClaim of a pvc:// URI is not in the job's namespace, or is being deleted.", (CLAIMS, DESCRIBE)
    ),
    Reason.CHECKPOINT_INCOMPATIBLE: Page(
        "The storage holds checkpoints that were made with another model, method, data or training; the message names what differs.",
        (FAILURE, HEAD_LOG),
    ),
    Reason.TRAINING_DIVERGED: Page(
        "The loss or a gradient is no number any more. The last good checkpoint is kept; the message names it.", (FAILURE, HEAD_LOG)
    ),
    Reason.KNOWLEDGE_BASE_INVALID: Page("A knowledge base has no text that can be read.", (FAILURE, HEAD_LOG)),
    Reason.COMPARISON_NOT_FOUND: Page(
        "A job of evaluation.compareWith has left no results in output.storage: it has not ended, failed, or has another storage.",
        (f"{_GET} finetunejobs", FAILURE),
    ),
    Reason.SEARCH_FAILED: Page("Every trial of the search failed.", (FAILURE, HEAD_LOG)),
    Reason.GATES_NOT_PASSED: Page("The tuned model was measured, and a gate says that it is not good enough.", (EVALUATION, FAILURE)),
    Reason.GATES_INCONCLUSIVE: Page(
        "The interval of a measured figure lies on both sides of a gate's limit: the examples are too few to tell.", (EVALUATION, FAILURE)
    ),
    Reason.DEGRADED: Page(
        "monitoring measured the published model on fresh data, and it is worse than it was at its release.",
        (f"{_GET} finetunejob JOB -o jsonpath='{{.status.monitoring}}'", FAILURE),
    ),
    # What the platform must change.
    Reason.TEACHER_UNAVAILABLE: Page("The teacher could not be read or asked, after many tries.", (FAILURE, HEAD_LOG)),
    Reason.GENERATOR_UNAVAILABLE: Page("The generator could not be read or asked, after many tries.", (FAILURE, HEAD_LOG)),
    Reason.JUDGE_UNAVAILABLE: Page("The judge could not be asked, after many tries.", (FAILURE, HEAD_LOG)),
    Reason.ENDPOINT_UNAVAILABLE: Page("The endpoint that monitoring measures could not be asked, after many tries.", (FAILURE, HEAD_LOG)),
    Reason.IMAGE_PULL_FAILED: Page(
        "The node cannot get the trainer's image: no such image or tag, a registry that does not answer, or no right to pull from it.",
        (DESCRIBE, EVENTS),
    ),
    Reason.UNSCHEDULABLE: Page(
        "The scheduler finds no node for a pod: too few free GPUs, CPUs or memory, a selector that no node matches, a taint that nobody "
        "tolerates, or a volume that is bound to another zone.",
        (DESCRIBE, "kubectl describe nodes", f"{_GET} pods -A --field-selector=status.phase=Running -o wide"),
    ),
    Reason.FORBIDDEN: Page(
        "The API server would not let the operator make an object: its role in this namespace lacks a right, or the object breaks a rule.",
        (OPERATOR_LOG, "kubectl auth can-i --list -n NAMESPACE --as=system:serviceaccount:finetune-system:finetune-operator"),
    ),
    Reason.QUOTA_EXCEEDED: Page(
        "The pods of the job would take the namespace beyond a ResourceQuota. The message has what was asked for, used and allowed.",
        (QUOTA, PODS),
    ),
    Reason.ADMISSION_DENIED: Page(
        "An admission webhook, a ValidatingAdmissionPolicy, Pod Security or a LimitRange refused an object of the job.",
        (
            "kubectl get validatingwebhookconfigurations,validatingadmissionpolicies",
            "kubectl get namespace NAMESPACE --show-labels",
            OPERATOR_LOG,
        ),
    ),
    Reason.CONTAINER_START_FAILED: Page(
        "The node could not start a container: its program is not in the image or for another processor, a mount is impossible, or a "
        "container that something adds to every pod keeps failing.",
        (DESCRIBE, EVENTS, f"{_GET} pods {_OF_JOB} -o jsonpath='{{.items[*].spec.containers[*].image}}'"),
    ),
    Reason.STORAGE_FULL: Page(
        "A disk, a quota or the pod's own volume is full. The checkpoint before the one that found no room is complete.",
        (FAILURE, CLAIM, DESCRIBE),
    ),
    Reason.STORAGE_UNAVAILABLE: Page(
        "A volume cannot be mounted or bound, was mounted read-only, or an object store does not answer or has no such bucket.",
        (FAILURE, CLAIM, EVENTS),
    ),
    Reason.OUT_OF_MEMORY: Page(
        "The kernel killed the container because it used more memory than its limit.", (DESCRIBE, TOP, f"{_GET} pods {_OF_JOB} -o yaml")
    ),
    Reason.HOST_OUT_OF_MEMORY: Page(
        "A process asked for memory and got none, or Ray's memory monitor killed a worker before the kernel would. The container itself "
        "was not killed: that would be OOMKilled.",
        (FAILURE, TOP, NODE),
    ),
    Reason.SHARED_MEMORY_FULL: Page(
        "A process ended by SIGBUS: memory that it had mapped could not be had. Mostly /dev/shm (2 GiB) is full; a file that was cut short "
        "while it was mapped, or a disk that is full, does the same.",
        (FAILURE, WORKER_LOG, "kubectl -n NAMESPACE exec JOB-ATTEMPT-worker-0 -- df -h /dev/shm /tmp"),
    ),
    Reason.GPU_OUT_OF_MEMORY: Page(
        "A GPU's memory does not hold the model, its gradients and even the smallest micro-batch, or somebody else uses the same GPU.",
        (FAILURE, WORKER_LOG, "kubectl -n NAMESPACE exec JOB-ATTEMPT-worker-0 -- nvidia-smi"),
    ),
    Reason.GPU_HARDWARE_ERROR: Page(
        "The driver reports a fault of the hardware: memory errors that cannot be corrected (ECC), a GPU that has fallen off the bus (Xid "
        "79), or a broken NVLink.",
        (PODS, NODE, "kubectl debug node/NODE -it --image=busybox -- chroot /host dmesg"),
    ),
    Reason.GPU_UNAVAILABLE: Page(
        "CUDA finds no GPU that it can use: none was asked for, the node's driver is too old or was updated without a restart, or the "
        "container was started without the devices.",
        (NODE, "kubectl -n NAMESPACE exec JOB-ATTEMPT-worker-0 -- nvidia-smi", WORKER_LOG),
    ),
    Reason.GPU_KERNEL_FAILED: Page(
        "A kernel on the GPU stopped itself (device-side assert) or touched memory that is not its own (illegal memory access).",
        (FAILURE, WORKER_LOG, PODS),
    ),
    # What the cluster did.
    Reason.PREEMPTED: Page(
        "Pods with a higher priority, a queue, a drain of the node or somebody with kubectl took a pod of the job. It counts as a "
        "preemption and not as a failure.",
        (EVENTS, PODS, "kubectl get nodes"),
    ),
    Reason.EVICTED: Page(
        "The kubelet evicted a pod because its node was short of memory, disk or process numbers. It counts as a preemption.",
        (EVENTS, NODE, TOP),
    ),
    Reason.NODE_LOST: Page(
        "The node of a pod was deleted, switched off, or did not answer for too long. It counts as a preemption.",
        ("kubectl get nodes", NODE),
    ),
    Reason.NODE_REJECTED: Page(
        "The kubelet of the node refused the pod that the scheduler had given it: its GPUs, CPUs or labels had changed meanwhile. It "
        "counts as a preemption.",
        (DESCRIBE, NODE),
    ),
    Reason.HEAD_LOST: Page(
        "The head pod is gone, or its process was killed with SIGKILL, and not for its memory. Nothing is known but that. A process that "
        "hangs is killed by its node after ten minutes without an answer to the liveness probe.",
        (PODS, EVENTS, "kubectl get nodes"),
    ),
    Reason.WORKERS_LOST: Page(
        "Workers died again and again, or too few came together, and none of them said why.", (WORKER_LOG, DESCRIBE, EVENTS)
    ),
    Reason.COMMUNICATION_FAILED: Page(
        "NCCL could not set up or keep a connection between workers, or a call of it to CUDA or the system failed.",
        (WORKER_LOG, PODS, f"{_GET} networkpolicies"),
    ),
    Reason.NCCL_HANG: Page(
        "A collective operation did not end in time: one of the workers was stuck, slow or gone while the others waited for it.",
        (WORKER_LOG, PODS, NODE),
    ),
    Reason.NO_PROGRESS: Page(
        "Steps were being taken, and then none for progressDeadlineSeconds (or for ten times as long as a step takes, where that is "
        "longer), though the head answers. Loading, compiling, validating and saving do not count.",
        (WORKER_LOG, "kubectl -n NAMESPACE exec JOB-ATTEMPT-worker-0 -- ps aux", PODS),
    ),
    # Limits of the spec.
    Reason.PRE_RUNNING_DEADLINE_EXCEEDED: Page(
        "The pods that the attempt needs did not run within preRunningDeadlineSeconds, or the operator could not reach its head; "
        "those that did run let go of what they held.",
        (DESCRIBE, EVENTS, "kubectl describe nodes", f"{_GET} networkpolicies"),
    ),
    Reason.DEADLINE_EXCEEDED: Page(
        "The job as a whole took longer than activeDeadlineSeconds, a measuring run longer than that or than its schedule leaves to it "
        "(a day at most), or a pod longer than something else allows pods here.",
        (SPEC, HEAD_LOG),
    ),
    Reason.BACKOFF_LIMIT_EXCEEDED: Page("As many attempts failed as backoffLimit allows, and one more.", (FAILURE, EVENTS)),
    Reason.CANCELED: Page(
        "Somebody gave the job up with the annotation finetune.dev/cancel; its pods saved a checkpoint first.", (SPEC, EVENTS)
    ),
    Reason.BUDGET_EXCEEDED: Page(
        "The GPU-hours that the job has used reached maxGpuHours; a checkpoint was saved first.",
        (f"{_GET} finetunejob JOB -o jsonpath='{{.status.usage}}'", SPEC),
    ),
    # What we must change.
    Reason.CHECKPOINT_CORRUPTED: Page(
        "Files of the checkpoints do not have the sums of their manifest: they were changed, cut short or lost after they were written.",
        (FAILURE, HEAD_LOG),
    ),
    Reason.EVALUATION_FAILED: Page("The tuned model could not be measured.", (HEAD_LOG, WORKER_LOG)),
    Reason.PUBLISH_FAILED: Page("The result could not be put into output.storage.", (FAILURE, HEAD_LOG)),
    Reason.PROCESS_CRASHED: Page(
        "A process ended by SIGSEGV, SIGABRT, SIGILL or SIGFPE: native code crashed, without a Python error.",
        (FAILURE, HEAD_LOG, WORKER_LOG, NODE),
    ),
    Reason.INTERNAL_ERROR: Page("Something happened that nobody has foreseen.", (FAILURE, HEAD_LOG, WORKER_LOG, OPERATOR_LOG)),
}


def page(reason: Reason) -> str:
    """All that is known of a reason, as Markdown below a heading. Raises KeyError for a failure without a page."""
    if reason in MEANINGS:
        return f"## {reason}\n\n{MEANINGS[reason]}\n"
    advice, found = ADVICE[reason], PAGES[reason]
    again = "another attempt is made, up to `backoffLimit` times" if advice.retryable else "no: the job has failed"
    checks = "\n".join(f"- `{command}`" for command in found.check)
    return f"## {reason}\n\n**Cause.** {found.cause}\n\n**Retried:** {again}.\n\n**Check:**\n\n{checks}\n\n**Fix.** {advice.hint}\n"


def document(notice: str) -> str:
    """docs/reasons.md: every reason, failures first. Raises ValueError naming failures that have no page."""
    missing = sorted(set(ADVICE) - set(PAGES))
    if missing:
        raise ValueError(f"finetune_api/reason_pages.py has no page for {', '.join(missing)}: say the cause and what to check")
    links = ", ".join(f"[{reason}](#{reason.lower()})" for reason in ADVICE)
    head = (
        f"<!-- {notice} -->\n# Reasons\n\n"
        "Every failure ends with one of these words in `status.failure.reason`, in conditions, Events and metrics. `finetune explain "
        "REASON` prints the same page.\nIn the commands NAMESPACE, JOB and ATTEMPT (`status.attempt.number`) stand for the job's own.\n\n"
        f"Failures: {links}\n\n"
    )
    ways = "\n".join(f"- `{reason}`: {meaning}" for reason, meaning in MEANINGS.items())
    return head + "\n".join(page(reason) for reason in ADVICE) + f"\n# Reasons of a job that goes well\n\n{ways}\n"
