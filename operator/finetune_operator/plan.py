"""The objects that should exist, given a job and its status; and so what is missing, and what is surplus. Pure.

Everything of attempt N of job J is named J-N or J-N-..., and goes with the job: its ConfigMap and its pods belong to the job, and what
else it has belongs to the ConfigMap, so that deleting that deletes them all.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from finetune_api import API_VERSION, KIND, LABEL_ATTEMPT, LABEL_JOB_NAME, LABEL_JOB_UID, LABEL_ROLE
from finetune_api.endpoint_bounds import BOUNDS_KEY, EndpointBounds
from finetune_api.newer_fields import shape_of
from finetune_api.reasons import Reason
from finetune_api.report import REPORT_PORT
from finetune_api.status import Status
from finetune_api.v1alpha1 import Spec
from finetune_operator.gangs import Marks, marks_of_worker, pod_group, queue_labels
from finetune_operator.kinds import POD_GROUPS
from finetune_operator.observed import ANNOTATION_OBJECTS, OWNED, REMADE, Job, Observed, Pod
from finetune_operator.pods import JOB_KEY, RAY_PORT, TOKEN_KEY, head_pod, worker_pod
from finetune_operator.profiles import as_offered, endpoint_bounds
from finetune_operator.settings import Settings
from finetune_operator.times import later

Manifest = dict[str, Any]

ATTEMPT_KINDS = ("Secret", "Service", "NetworkPolicy", "ConfigMap")
"""Objects of an attempt beside its pods. The ConfigMap is made first: while it exists the others may, and it is the one that is
looked for (Secrets may not be listed). Those of an attempt that an earlier operator began belong to the job: they go in this order."""

ANCHOR = "ConfigMap"

REPLACE_SECONDS = 10
"""A worker pod that failed is made anew this long after it was made: one that fails at once must not be made without end."""
OVERDUE_SECONDS = 60
"""A pod still there this long after its grace is on a node that is gone: its object is removed without waiting for the node."""
ORPHAN_GRACE_SECONDS = 10
"""Grace of workers whose head has gone: there is nothing left for them to save."""
METRICS_NAMESPACE_LABEL = {"finetune.dev/metrics": "true"}
"""Namespaces that may read /metrics of the trainers, such as Prometheus's."""


@dataclass(frozen=True)
class Removal:
    """An object that is to go."""

    kind: str
    name: str
    uid: str | None = None
    grace: int | None = None
    """Seconds; None is the pod's own."""
    labels: Mapping[str, str] | None = None
    """Not one object but every pod with these labels; `name` says which these are."""


def desired_objects(job: Job, status: Status, settings: Settings) -> tuple[Manifest, ...]:
    """The manifests of the running attempt, or measuring run (see monitoring.acting), in the order in which they are made; else none.

    What belongs to the ConfigMap lacks its UID, which is known when that is made (see `belonging`).
    """
    if job.spec is None or not status.attempt.running:
        return ()
    settings = as_offered(settings, status)
    spec, image = _as_run(job.spec, status, settings)
    number = status.attempt.number
    name = f"{job.name}-{number}"
    meta = {"name": name, "namespace": job.namespace, "labels": _labels(job, number), "ownerReferences": [_owner(job)]}
    beside = {**meta, "ownerReferences": [{"apiVersion": "v1", "kind": ANCHOR, "name": name, "controller": True}]}
    secret = secret_name(job.name, job.uid, number)
    head = _owned_pod(meta, "head", head_pod(name, secret, job.namespace, spec, image, settings), Marks())
    workers = [
        _owned_pod(
            meta,
            "worker",
            worker_pod(name, secret, job.namespace, index, spec, image, settings),
            marks_of_worker(job, spec, status, index, settings),
        )
        for index in range(status.workers_wanted)
    ]
    return (
        _config_map(meta, job, spec, endpoint_bounds(spec, status), settings),
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {**beside, "name": secret},
            "type": "Opaque",
            "stringData": {TOKEN_KEY: settings.token(job.uid, number)},
        },
        _service(beside),
        _network_policy(beside, job, settings),
        *pod_group(job, spec, beside, settings),
        head,
        *workers,
    )


def _as_run(spec: Spec, status: Status, settings: Settings) -> tuple[Spec, str]:
    """The spec that the pods are given, and their image. One with monitoring is that of a measuring run: an attempt's has none.

    An attempt keeps the trainer that the job began with; a run, maybe years later, has the operator's own.
    """
    if status.finished:
        return spec, settings.trainer_image
    began_with = status.resolved.trainer_image if status.resolved else None
    return spec.model_copy(update={"monitoring": None}), began_with or settings.trainer_image


def secret_name(job_name: str, uid: str, attempt: int) -> str:
    """Name of an attempt's Secret. It follows from the job's UID too: whose Secret it is must be plain from its name alone.

    The operator may not read Secrets, so it could not tell one of its own from a user's, or from that of a deleted job of the same name.
    """
    return f"{job_name}-{attempt}-{hashlib.sha256(uid.encode()).hexdigest()[:8]}"


def missing(desired: tuple[Manifest, ...], status: Status, observed: Observed) -> tuple[Manifest, ...]:
    """What of the desired objects is to be applied. The head pod is made after the attempt's other objects, so it tells that they exist.

    Unless a pod cannot find the attempt's Secret or ConfigMap: then one of a deleted job of the same name was taken for it.
    """
    names = {pod.name for pod in observed.pods}
    pods = tuple(m for m in desired if m["kind"] == "Pod" and m["metadata"]["name"] not in names)
    beside = tuple(m for m in desired if m["kind"] != "Pod")
    number = status.attempt.number
    head = observed.head(number)
    there = number in observed.anchors and number not in observed.remade
    if not beside or (head is not None and there and not any(_without_its_own(pod) for pod in (head, *observed.workers(number)))):
        return pods
    if number in observed.anchors - observed.owning:
        return (*_of_the_job(beside), *pods)
    return (*(_made_anew(beside) if head is not None else beside), *pods)


def _of_the_job(beside: tuple[Manifest, ...]) -> tuple[Manifest, ...]:
    """The objects as an operator of before makes them, for an attempt that it began: what is there belongs to the job."""
    owner = {"ownerReferences": beside[0]["metadata"]["ownerReferences"]}
    plain = ({**m["metadata"], **owner} for m in beside)
    return tuple({**m, "metadata": {key: meta[key] for key in meta if key != "annotations"}} for m, meta in zip(beside, plain, strict=True))


def _made_anew(beside: tuple[Manifest, ...]) -> tuple[Manifest, ...]:
    """The objects beside a head that is there already: it tells no longer that they all exist, so the ConfigMap does.

    Somebody has deleted that, and the others go with it: one that is still to go may stand in the way of its successor for a moment.
    """
    anchor, *others = beside
    return (_marked(anchor, REMADE), *others, anchor)


def _marked(anchor: Manifest, mark: str) -> Manifest:
    return {**anchor, "metadata": {**anchor["metadata"], "annotations": {ANNOTATION_OBJECTS: mark}}}


def belonging(manifest: Manifest, anchor: str | None) -> Manifest:
    """The manifest with the UID of its attempt's ConfigMap, where it belongs to that."""
    (owner,) = manifest["metadata"]["ownerReferences"]
    if owner["kind"] != ANCHOR:
        return manifest
    return {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": [{**owner, "uid": anchor}]}}


def _without_its_own(pod: Pod) -> bool:
    """Whether it waits for the Secret or the ConfigMap of its own attempt."""
    waiting, attempt_name = pod.waiting, re.sub(r"-(head|worker-[0-9]+)$", "", pod.name)
    return (
        waiting is not None
        and waiting.reason in (Reason.SECRET_NOT_FOUND, Reason.CONFIG_MAP_NOT_FOUND)
        and re.search(rf'"{re.escape(attempt_name)}(-[0-9a-f]{{8}})?"', waiting.message) is not None
    )


def surplus(
    desired: tuple[Manifest, ...], job: Job, status: Status, observed: Observed, settings: Settings, now: datetime
) -> tuple[Removal, ...]:
    """What exists and should not, in the order in which it goes: pods, then what they need, the head before its workers."""
    wanted = {manifest["metadata"]["name"] for manifest in desired if manifest["kind"] == "Pod"}
    look = _Look(wanted, status, observed, settings, now)
    pods = _together(job, observed, wanted, {pod: removal for pod in observed.pods if (removal := look.removal(pod)) is not None})
    needed = {pod.attempt for pod in observed.alive} | ({status.attempt.number} if status.attempt.running else set())
    idle = sorted(observed.anchors - needed)
    return (*pods, *(removal for number in idle for removal in _removals(job, number, observed, settings)))


def _together(job: Job, observed: Observed, wanted: set[str], leaving: Mapping[Pod, Removal]) -> tuple[Removal, ...]:
    """The removals of pods, the workers of an attempt in one where all of them go and no other pod has their labels."""
    removals: dict[str, Removal] = {}
    for pod, removal in leaving.items():
        crew = f"{job.name}-{pod.attempt}-worker"
        workers = observed.workers(pod.attempt)
        whole = pod.role == "worker" and len(workers) > 1 and all(each in leaving or each.deletion is not None for each in workers)
        if whole and removal.grace != 0 and not observed.strangers and not any(name.startswith(f"{crew}-") for name in wanted):
            labels = {LABEL_JOB_UID: job.uid, LABEL_ATTEMPT: str(pod.attempt), LABEL_ROLE: "worker"}
            removals[crew] = Removal("Pod", f"{crew}-*", grace=removal.grace, labels=labels)
        else:
            removals[pod.name] = removal
    return tuple(removals.values())


def _removals(job: Job, attempt: int, observed: Observed, settings: Settings) -> tuple[Removal, ...]:
    """What is deleted of an attempt's objects beside its pods, in this order."""
    if attempt in observed.owning:
        return (Removal(ANCHOR, f"{job.name}-{attempt}"),)
    names = {"Secret": secret_name(job.name, job.uid, attempt)}
    groups = ("PodGroup",) if settings.gang_scheduler in POD_GROUPS else ()
    return tuple(Removal(kind, names.get(kind, f"{job.name}-{attempt}")) for kind in (*groups, *ATTEMPT_KINDS))


@dataclass(frozen=True)
class _Look:
    """What decides whether a pod goes."""

    wanted: set[str]
    status: Status
    observed: Observed
    settings: Settings
    now: datetime

    def removal(self, pod: Pod) -> Removal | None:
        """How the pod goes; None where it stays, or is going."""
        if pod.deletion is not None:
            overdue = self.now > pod.deletion + timedelta(seconds=OVERDUE_SECONDS)
            return Removal("Pod", pod.name, pod.uid, grace=0) if overdue and not pod.forced else None
        if pod.name in self.wanted:
            worn_out = pod.role == "worker" and pod.finished and self.now >= pod.created + timedelta(seconds=REPLACE_SECONDS)
            return Removal("Pod", pod.name, pod.uid) if worn_out else None
        if self._stays(pod):
            return None
        return Removal("Pod", pod.name, pod.uid, grace=ORPHAN_GRACE_SECONDS if self._orphan(pod) else None)

    def _stays(self, pod: Pod) -> bool:
        """Pods that nothing wants, and that stay a while nevertheless."""
        status = self.status
        if pod.role == "worker":
            # The head has them save a checkpoint before it goes; so it goes first.
            return self._head_alive(pod.attempt) and not status.attempt.running and not self._succeeded
        if pod.attempt != status.attempt.number or status.suspended_time is not None:
            return False
        if pod.finished:
            return not pod.lingering  # Its log can be read, and it holds nothing.
        return self._succeeded and self.now < later(status.attempt.end_time or "", self.settings.grace_seconds)

    def _orphan(self, pod: Pod) -> bool:
        return pod.role == "worker" and not self._head_alive(pod.attempt)

    def _head_alive(self, attempt: int) -> bool:
        head = self.observed.head(attempt)
        return head is not None and not head.finished

    @property
    def _succeeded(self) -> bool:
        complete = self.status.condition("Complete")
        return complete is not None and complete.status == "True"


def _owner(job: Job) -> Manifest:
    return {"apiVersion": API_VERSION, "kind": KIND, "name": job.name, "uid": job.uid, "controller": True, "blockOwnerDeletion": True}


def _labels(job: Job, attempt: int) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "finetune-trainer",
        "app.kubernetes.io/instance": job.name,
        "app.kubernetes.io/part-of": "finetune-operator",
        "app.kubernetes.io/managed-by": "finetune-operator",
        LABEL_JOB_NAME: job.name,
        LABEL_JOB_UID: job.uid,
        LABEL_ATTEMPT: str(attempt),
    }


def _owned_pod(meta: Manifest, role: str, pod: Manifest, marks: Marks) -> Manifest:
    """The pod with the attempt's metadata, and what queues and schedulers read from it."""
    labels = {**marks.labels, **meta["labels"], LABEL_ROLE: role, "app.kubernetes.io/component": role}
    annotations = {"annotations": dict(marks.annotations)} if marks.annotations else {}
    return {**pod, "metadata": {**meta, **pod["metadata"], "labels": labels, **annotations}, "spec": {**pod["spec"], **marks.spec}}


def _config_map(meta: Manifest, job: Job, spec: Spec, bounds: EndpointBounds | None, settings: Settings) -> Manifest:
    """The job as it runs, with every default in place; of its labels those that say that a queue may hold its pods back.

    What its profile says of its Secrets stands there too, for the head to hold to.

    Which fields have another value than their default is told beside it: an image of before may not know the others.
    """
    identity: Manifest = {"name": job.name, "namespace": job.namespace, "uid": job.uid, "generation": job.generation}
    identity |= {"labels": queue} if (queue := queue_labels(job, settings)) else {}
    identity |= {BOUNDS_KEY: bounds.model_dump(mode="json", by_alias=True)} if bounds else {}
    spelled = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    identity["chosen"] = shape_of(spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True))
    text = json.dumps({"apiVersion": API_VERSION, "kind": KIND, "metadata": identity, "spec": spelled}, indent=2)
    return _marked({"apiVersion": "v1", "kind": ANCHOR, "metadata": meta, "data": {JOB_KEY: text}}, OWNED)


def _service(meta: Manifest) -> Manifest:
    """Gives the pods names; a head must be found before it is ready."""
    selector = {key: meta["labels"][key] for key in (LABEL_JOB_UID, LABEL_ATTEMPT)}
    # Server-side apply tells ports apart by port and protocol, so neither may be left to a default.
    ports = [{"name": name, "port": port, "protocol": "TCP"} for name, port in (("ray", RAY_PORT), ("report", REPORT_PORT))]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector, "ports": ports},
    }


def _network_policy(meta: Manifest, job: Job, settings: Settings) -> Manifest:
    """In: the job's own pods; to the report and metrics port also the operator, and whoever reads metrics. Out: storage and hubs.

    Ray's own ports are many and only in part behind its token, so nobody else may reach them. Cloud metadata services give
    out the node's credentials, so no pod may reach those.
    """
    own = {"podSelector": {"matchLabels": {LABEL_JOB_UID: job.uid}}}
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.operator_namespace}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "finetune-operator"}},
    }
    metrics = {"namespaceSelector": {"matchLabels": METRICS_NAMESPACE_LABEL}}
    dns = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    # Link-local (most clouds), Alibaba's, Azure's; AWS's, Google's, link-local.
    outside = [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16", "100.100.100.200/32", "168.63.129.16/32"]}},
        {"ipBlock": {"cidr": "::/0", "except": ["fd00:ec2::/32", "fd20:ce::254/128", "fe80::/10"]}},
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": meta,
        "spec": {
            "podSelector": own["podSelector"],
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [own]}, {"from": [operator, metrics], "ports": [{"port": REPORT_PORT, "protocol": "TCP"}]}],
            "egress": [{"to": [own]}, {"ports": dns}, {"to": outside}],
        },
    }
