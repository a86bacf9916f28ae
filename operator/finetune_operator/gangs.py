"""Workers as one gang: what the queue or the scheduler of the platform reads from them. Pure.

The gang are the workers without which the training does not start (`workers.min`): they are let in together or not at all. Those beyond
come one by one, as there is room. The head is in no gang: it needs no GPU, and prepares the data before it asks for workers.

- Kueue: pods with a queue's name are held back by a scheduling gate until their group fits the quota. A group is used once, since Kueue is
  told that its pods are not made again (`retriable-in-group`): what it preempts ends the attempt, and the next one has a group of its own.
- Volcano and the scheduler plugins' coscheduling: pods name a PodGroup, which the operator makes with the attempt's other objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.status import Attempt, Status
from finetune_api.v1alpha1 import Spec
from finetune_operator.observed import Job, Observed, Pod
from finetune_operator.queue_names import KUEUE, KUEUE_QUEUE, VOLCANO_QUEUE, queue_of
from finetune_operator.settings import Settings

Manifest = dict[str, Any]

GROUP_NAME = f"{KUEUE}/pod-group-name"
GROUP_COUNT = f"{KUEUE}/pod-group-total-count"
RETRIABLE = f"{KUEUE}/retriable-in-group"
VOLCANO_GROUP = "scheduling.k8s.io/group-name"
PLUGINS_GROUP = "scheduling.x-k8s.io/pod-group"


@dataclass(frozen=True)
class Marks:
    """What a pod carries for whoever schedules it."""

    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)


def in_queue(job: Job, settings: Settings) -> bool:
    """Whether Kueue lets this job's workers in: those of a job that its label, or its profile, has put in a queue."""
    return settings.gang_scheduler == "kueue" and bool(queue_of(job.labels, KUEUE_QUEUE, job.status))


def queue_labels(job: Job, settings: Settings) -> dict[str, str]:
    """The job's labels of Kueue, of which one names the queue that it is in, be it by its profile."""
    own = {key: value for key, value in job.labels.items() if key.startswith(f"{KUEUE}/")}
    return {**own, KUEUE_QUEUE: queue_of(job.labels, KUEUE_QUEUE, job.status)} if in_queue(job, settings) else own


def gang_size(spec: Spec, wanted: int) -> int:
    """Workers of the gang, where so many are wanted."""
    return min(spec.compute.workers.min, wanted)


def marks_of_worker(job: Job, spec: Spec, status: Status, index: int, settings: Settings) -> Marks:
    """What a worker carries, by its number."""
    name, size = f"{job.name}-{status.attempt.number}", gang_size(spec, status.workers_wanted)
    if settings.gang_scheduler == "volcano":
        return Marks(annotations={VOLCANO_GROUP: name}, spec={"schedulerName": settings.scheduler_name or "volcano"})
    if settings.gang_scheduler == "scheduler-plugins":
        return Marks(labels={PLUGINS_GROUP: name}, spec={"schedulerName": settings.scheduler_name or "scheduler-plugins-scheduler"})
    if not in_queue(job, settings):
        return Marks()
    queue = queue_labels(job, settings)
    if index >= size:
        return Marks(labels=queue)
    # Job names have 48 characters at most, so with two numbers a group's name is still a label.
    group = {GROUP_NAME: f"{name}-{status.attempt.gangs}"}
    return Marks(labels={**queue, **group}, annotations={GROUP_COUNT: str(size), RETRIABLE: "false"})


def pod_group(job: Job, spec: Spec, meta: Manifest, settings: Settings) -> tuple[Manifest, ...]:
    """The PodGroup of an attempt, where the scheduler wants one."""
    least = spec.compute.workers.min
    if settings.gang_scheduler == "volcano":
        queue = queue_of(job.labels, VOLCANO_QUEUE, job.status)
        spec_of_group: Manifest = {"minMember": least, **({"queue": queue} if queue else {})}
        return ({"apiVersion": "scheduling.volcano.sh/v1beta1", "kind": "PodGroup", "metadata": meta, "spec": spec_of_group},)
    if settings.gang_scheduler == "scheduler-plugins":
        return ({"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "metadata": meta, "spec": {"minMember": least}},)
    return ()


def next_gang(attempt: Attempt, before: int, wanted: int) -> Attempt:
    """The attempt, with one more gang where workers come to be wanted that were not."""
    if before > 0 or wanted == 0:
        return attempt
    return attempt.model_copy(update={"gangs": attempt.gangs + 1, "gang_seen": False})


def members(observed: Observed, attempt: int, size: int) -> tuple[Pod, ...]:
    """The workers of the gang that exist."""
    numbers = {f"worker-{index}" for index in range(size)}
    return tuple(pod for pod in observed.workers(attempt) if "-".join(pod.name.rsplit("-", 2)[-2:]) in numbers)
