"""Raw objects as plain values: what is there, in the words that decisions are made in. Pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from pydantic import ValidationError

from finetune_api import LABEL_ATTEMPT, LABEL_ROLE
from finetune_api.report import Report, parse_report
from finetune_api.scrub import scrub
from finetune_api.status import Status
from finetune_api.v1alpha1 import Spec, parse_job
from finetune_operator.diagnosis import Disruption, Raw, Waiting, condition, disruption_of, waiting_of
from finetune_operator.manifest import explain
from finetune_operator.profiles import Offered, effective, left_out
from finetune_operator.queue_names import KUEUE

__all__ = ["Exit", "Job", "Observed", "Pod", "Raw", "Role", "Waiting", "head_name", "job_from", "observe", "pod_from"]

Role = Literal["head", "worker"]

ANNOTATION_OBJECTS = "finetune.dev/objects"
"""On an attempt's ConfigMap: that the attempt's other objects belong to it, and whether they are all there if its head is."""
OWNED, REMADE = "owned", "remade"


@dataclass(frozen=True)
class Exit:
    """How a pod's container ended."""

    code: int
    reason: str
    """The kubelet's word: Completed, Error, OOMKilled, ..."""
    message: str
    """The termination message, or the log's tail."""


@dataclass(frozen=True)
class Pod:
    """One pod of a job."""

    name: str
    namespace: str
    uid: str
    role: Role
    attempt: int
    phase: str
    """Pending, Running, Succeeded, Failed or Unknown."""
    created: datetime
    ip: str | None = None
    deletion: datetime | None = None
    """When its grace ends, where it has been told to go."""
    forced: bool = False
    """It has been told to go without waiting for its node; what keeps its object is somebody's finalizer."""
    exit: Exit | None = None
    waiting: Waiting | None = None
    """Why it does not run, while it is pending."""
    gated: bool = False
    """A queue (Kueue) holds it back."""
    let_in: bool = False
    """A queue (Kueue) has let it in."""
    gates: tuple[str, ...] = ()
    """Names of its scheduling gates."""
    disruption: Disruption | None = None
    """Where the cluster took it away."""
    reason: str = ""
    message: str = ""
    """The kubelet's word, and words, about the pod as a whole."""
    gpus: int = 0
    """GPUs that it holds while it has a node."""
    scheduled: datetime | None = None
    """When it was given its node."""
    started: datetime | None = None
    """When its container was started, while it runs."""
    ended: datetime | None = None
    """When its containers ended, or the cluster took it away."""
    lingering: bool = False
    """Its container has ended, but not another one that something in the cluster has put beside it: that goes when it is told to."""

    @property
    def finished(self) -> bool:
        """Its container has ended and will not start again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def running(self) -> bool:
        """Its container runs, and nobody has told it to go."""
        return self.phase == "Running" and self.deletion is None


@dataclass(frozen=True)
class Observed:
    """What exists of a job."""

    pods: tuple[Pod, ...] = ()
    anchors: frozenset[int] = frozenset()
    """Attempts whose ConfigMap exists. It is made first and removed last: without it there is no Secret, Service, NetworkPolicy either."""
    report: Report | None = None
    """What the head of the current attempt says, if it could be asked."""
    refusal: Waiting | None = None
    """The API server's words, where it has just refused an object of this job."""

    offered: Offered = field(default_factory=Offered)
    """The platform's profiles, while the job has yet to be told under which one it runs."""
    owning: frozenset[int] = frozenset()
    """Anchors to which their attempts' other objects belong, so that these go with them. An earlier operator's own nothing."""
    remade: frozenset[int] = frozenset()
    """Anchors that were made anew beside a head, and whose attempts' other objects may not all be there yet."""
    clock_set: datetime | None = None
    """When the operator's clock was last found to have been set: what was noted before is no measure of how long something takes."""
    looked: float | None = None
    """Seconds for which this operator has looked at the job again and again; None where nobody counts them."""
    strangers: bool = False
    """Somebody has given the job's label to a pod that is not the job's."""

    def head(self, attempt: int) -> Pod | None:
        """The head pod of an attempt."""
        return next((pod for pod in self.pods if pod.role == "head" and pod.attempt == attempt), None)

    def workers(self, attempt: int) -> tuple[Pod, ...]:
        """The worker pods of an attempt, by name."""
        return tuple(pod for pod in self.pods if pod.role == "worker" and pod.attempt == attempt)

    @property
    def alive(self) -> tuple[Pod, ...]:
        """Pods of any attempt that have not ended: they may still write to the job's storage."""
        return tuple(pod for pod in self.pods if not pod.finished)

    def report_of(self, uid: str, attempt: int) -> Report | None:
        """What an attempt last said: the head's answer, or the message it left when it ended."""
        head = self.head(attempt)
        left = parse_report(head.exit.message) if head and head.exit else None
        for report in (left, self.report):
            if report and report.job_uid == uid and report.attempt == attempt:
                return report
        return None


@dataclass(frozen=True)
class Job:
    """A FineTuneJob as read: its spec, or what is wrong with it."""

    name: str
    namespace: str
    uid: str
    generation: int
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    deleting: bool
    spec: Spec | None
    """The spec that runs: the job's own with what its profile gives and bounds. None where it cannot be understood."""
    problem: str
    """What is wrong with the spec, by field."""
    status: Status
    left_out: str = ""
    """Why spec.monitoring is not in the spec that runs: what of it the profile does not allow. Empty where nothing was left out."""


def job_from(raw: Raw, *, local: bool = False) -> Job:
    """The job in a raw FineTuneJob. A spec that breaks the rules is a value, not an error."""
    meta = raw["metadata"]
    spec, problem = _spec(raw, local)
    status = Status.model_validate(raw.get("status") or {})
    return Job(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        generation=meta.get("generation", 1),
        labels=meta.get("labels") or {},
        annotations=meta.get("annotations") or {},
        deleting=meta.get("deletionTimestamp") is not None,
        spec=effective(spec, status, local=local) if spec else None,
        problem=problem,
        status=status,
        left_out=left_out(spec, status) if spec else "",
    )


def with_status(job: Job, status: Status, *, local: bool = False) -> Job:
    """The job when it has come to this status: under the profile that the status keeps."""
    if job.spec is None:
        return replace(job, status=status)
    # What was left out before is not in the job's spec any more.
    why = job.left_out or left_out(job.spec, status)
    return replace(job, status=status, spec=effective(job.spec, status, local=local), left_out=why)


def _spec(raw: Raw, local: bool) -> tuple[Spec | None, str]:
    manifest = {key: raw[key] for key in ("apiVersion", "kind", "metadata", "spec") if key in raw}
    try:
        return parse_job(manifest, local=local).spec, ""
    except ValidationError as error:
        return None, scrub("; ".join(explain(error)))


def observe(
    name: str, uid: str, pods: Iterable[Raw], config_maps: Iterable[Raw], events: Iterable[Raw], report: Report | None = None
) -> Observed:
    """The observation in raw pods, ConfigMaps (metadata is enough) and Events of the pending pods of a job of this name and UID.

    Whoever may make objects in the job's namespace may label them as the job's, and name the job as their owner. So only those count
    that this operator would have made: with the job as owner, whole labels, and the name that follows from them.
    """
    told, labelled = tuple(events), tuple(pods)
    own = [pod_from(pod, told) for pod in labelled if _owned(pod, uid) and _is_pod_of(pod, name)]
    maps = {int(_label(each, LABEL_ATTEMPT)): each for each in config_maps if _owned(each, uid) and _is_anchor_of(each, name)}
    marks = {attempt: (each["metadata"].get("annotations") or {}).get(ANNOTATION_OBJECTS) for attempt, each in maps.items()}
    return Observed(
        pods=tuple(sorted(own, key=lambda pod: pod.name)),
        anchors=frozenset(maps),
        owning=frozenset(attempt for attempt, mark in marks.items() if mark in (OWNED, REMADE)),
        remade=frozenset(attempt for attempt, mark in marks.items() if mark == REMADE),
        strangers=len(own) < len(labelled),
        report=report,
    )


def _owned(raw: Raw, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in raw["metadata"].get("ownerReferences") or ())


def _label(raw: Raw, key: str) -> str:
    return str((raw["metadata"].get("labels") or {}).get(key, ""))


def head_name(job: str, attempt: int) -> str:
    """Name of the head pod of an attempt."""
    return f"{job}-{attempt}-head"


_ATTEMPT = re.compile(r"[1-9][0-9]{0,15}", re.ASCII)


def _is_anchor_of(raw: Raw, job: str) -> bool:
    attempt = _label(raw, LABEL_ATTEMPT)
    return _ATTEMPT.fullmatch(attempt) is not None and raw["metadata"]["name"] == f"{job}-{attempt}"


def _is_pod_of(raw: Raw, job: str) -> bool:
    attempt, role = _label(raw, LABEL_ATTEMPT), _label(raw, LABEL_ROLE)
    name = {"head": "head", "worker": r"worker-[0-9]+"}.get(role)
    if name is None or _ATTEMPT.fullmatch(attempt) is None:
        return False
    return re.fullmatch(f"{re.escape(job)}-{attempt}-{name}", raw["metadata"]["name"], re.ASCII) is not None


MANAGED_BY_KUEUE = f"{KUEUE}/managed"
"""A label that Kueue puts on the pods that it holds back, and leaves there."""


def pod_from(raw: Raw, events: Iterable[Raw] = ()) -> Pod:
    """One raw pod, with what the Events say about it."""
    meta, status = raw["metadata"], raw.get("status") or {}
    own = _own_state(meta["labels"][LABEL_ROLE], status)
    lingering = status.get("phase") == "Running" and "terminated" in own
    # No container is started again here, so a pod whose own has ended has ended, whoever else is still in it.
    phase = ("Failed" if own["terminated"]["exitCode"] else "Succeeded") if lingering else status.get("phase", "Pending")
    scheduled = condition(status, "PodScheduled")
    gates = tuple(str(gate.get("name", "")) for gate in (raw.get("spec") or {}).get("schedulingGates") or ())
    return Pod(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        role="head" if meta["labels"][LABEL_ROLE] == "head" else "worker",
        attempt=int(meta["labels"][LABEL_ATTEMPT]),
        phase=phase,
        created=datetime.fromisoformat(meta["creationTimestamp"]),
        ip=status.get("podIP"),
        deletion=datetime.fromisoformat(meta["deletionTimestamp"]) if meta.get("deletionTimestamp") else None,
        forced=bool(meta.get("deletionTimestamp")) and meta.get("deletionGracePeriodSeconds") == 0,
        exit=_exit(own, status),
        waiting=waiting_of(raw, events) if phase == "Pending" else None,
        gated=phase == "Pending" and bool(gates or scheduled.get("reason") == "SchedulingGated"),
        let_in=not gates and (meta.get("labels") or {}).get(MANAGED_BY_KUEUE) == "true",
        gates=gates,
        disruption=disruption_of(status),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        gpus=_gpus(raw),
        scheduled=_time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else _time(status.get("startTime")),
        started=_time((own.get("running") or {}).get("startedAt")),
        ended=_ended(status),
        lingering=lingering,
    )


def _own_state(role: str, status: Raw) -> Raw:
    """The state of the container that this operator has put into a pod, which is called as its role; empty where it has none yet."""
    return next((each.get("state") or {} for each in status.get("containerStatuses") or () if each.get("name") == role), {})


def _gpus(raw: Raw) -> int:
    limits = ((container.get("resources") or {}).get("limits") or {} for container in (raw.get("spec") or {}).get("containers") or ())
    return sum(_whole(amount) for each in limits for name, amount in each.items() if name.endswith("/gpu"))


_QUANTITY = re.compile(r"([0-9]{1,12})(k|M|G|Ki|Mi|Gi)?", re.ASCII)
_SCALE = {"k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def _whole(amount: int | str) -> int:
    """A number of devices, as the API server writes it: a thousand are 1k. 0 for what is none, in a pod that somebody else made."""
    found = _QUANTITY.fullmatch(str(amount))
    return int(found[1]) * _SCALE.get(found[2], 1) if found else 0


def _ended(status: Raw) -> datetime | None:
    """When the last of its containers ended; of a pod whose node is gone, when the cluster gave it up."""
    states = ((each.get("state") or {}).get("terminated") or {} for each in status.get("containerStatuses") or ())
    ends = [end for state in states if (end := _time(state.get("finishedAt")))]
    return max(ends, default=None) or _time(condition(status, "DisruptionTarget").get("lastTransitionTime"))


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _exit(own: Raw, status: Raw) -> Exit | None:
    states = (own, *(each.get("state") or {} for each in status.get("containerStatuses") or ()))
    ended = next((state["terminated"] for state in states if state.get("terminated")), None)
    return Exit(ended["exitCode"], ended.get("reason", ""), ended.get("message", "")) if ended else None
