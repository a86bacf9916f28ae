"""A cluster in memory: an API server that keeps one job and its objects, and a kubelet and trainer that play its pods.

The fake is a whole implementation of the operator's port, so that tests need not know which calls the loop makes.
"""

import itertools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from tests.builders import NAME, NAMESPACE, SETTINGS, Clock, stages, terminated

from finetune_api import LABEL_ATTEMPT, LABEL_JOB_UID, LABEL_ROLE
from finetune_api.report import Report, termination_message
from finetune_api.status import Artifact, Failure, Progress, Status, Usage
from finetune_operator.observed import Pod
from finetune_operator.port import Conflict, Event, JobKey, RawJob, Refused
from finetune_operator.reconcile import reconcile
from finetune_operator.times import rfc3339

KEY = JobKey(NAMESPACE, NAME)
Object = dict[str, Any]


def _copy(found: Any) -> Any:
    """What a reader gets, who may do with it what he likes; several times faster than `copy.deepcopy`."""
    return pickle.loads(pickle.dumps(found))  # noqa: S301 - the test's own objects


class Crash(BaseException):
    """The operator's process ends here: nothing of it may catch this."""


@dataclass
class FakeCluster:
    """The API server. `writes` counts the requests that change something, or try to."""

    clock: Clock
    job: Object | None
    objects: dict[tuple[str, str], Object] = field(default_factory=dict)
    events: dict[str, Event] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)
    crash_after: int | None = None
    """Number of the write after which the operator ends."""
    refuse: Callable[[Object], str | None] = lambda manifest: None
    """The words with which an object is refused."""
    admit: Callable[[Object], None] = lambda made: None
    """What an admission webhook does to an object that is made."""
    before_patch: Callable[[], None] = lambda: None
    """Somebody else acts just before the next write of a status."""
    reports: dict[str, Report] = field(default_factory=dict)
    """What a head says, by its pod's uid."""
    profiles: list[Object] = field(default_factory=list)
    """The TuningProfiles."""
    made: list[tuple[str, str]] = field(default_factory=list)
    """Kind and name of each object that was made."""
    _numbers: Any = field(default_factory=lambda: itertools.count(2))
    _read: tuple[Object, Status] | None = None
    """A raw status, and what was read from it."""

    # The port.

    async def read(self, key: JobKey) -> RawJob | None:
        if self.job is None or (self.job["metadata"]["namespace"], self.job["metadata"]["name"]) != tuple(key):
            return None
        uid = self.job["metadata"]["uid"]
        found = [each for each in self.objects.values() if each["metadata"]["labels"][LABEL_JOB_UID] == uid]
        job, own, profiles = _copy((self.job, found, self.profiles))
        pods = [each for each in own if each["kind"] == "Pod"]
        return RawJob(job, pods, [each for each in own if each["kind"] == "ConfigMap"], [], profiles)

    async def fetch_report(self, pod: Pod, token: str, after: int, wait: float) -> Report | None:
        return self.reports.get(pod.uid) if token else None

    async def patch_status(self, job: Object, status: Status) -> Object:
        self.before_patch()
        if self.job is None or self.job["metadata"]["resourceVersion"] != job["metadata"]["resourceVersion"]:
            raise Conflict("the object has been modified")
        self.job = {**self.job, "status": status.to_json()}
        self._touch(self.job)
        self._wrote("patch status")
        return _copy(self.job)

    async def apply(self, manifest: Object) -> str:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if words := self.refuse(manifest):
            self._wrote(f"refused {kind} {name}")
            raise Refused("Forbidden", words)
        if (kind, name) not in self.objects:
            self.objects[kind, name] = made = _copy(manifest)
            made["metadata"] |= {"uid": f"uid-{next(self._numbers)}", "creationTimestamp": rfc3339(self.clock.now)}
            if kind == "Pod":
                made["status"] = {"phase": "Pending"}
            self.admit(made)
            self.made.append((kind, name))
        elif kind == "ConfigMap":
            self.objects[kind, name]["metadata"]["annotations"] = dict(manifest["metadata"].get("annotations", {}))
        self._wrote(f"apply {kind} {name}")
        return str(self.objects[kind, name]["metadata"]["uid"])

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str | None = None, grace: int | None = None) -> None:
        found = self.objects.get((kind, name))
        if found is not None and namespace == NAMESPACE and uid in (None, found["metadata"]["uid"]):
            self.remove(found, grace)
        self._wrote(f"delete {kind} {name}")

    async def delete_pods(self, namespace: str, labels: Mapping[str, str], *, grace: int | None = None) -> None:
        for pod in self.pods:
            if namespace == NAMESPACE and labels.items() <= pod["metadata"]["labels"].items():
                self.remove(pod, grace)
        self._wrote("delete pods")

    async def delete_job(self, job: Object) -> None:
        if self.job is not None and self.job["metadata"]["uid"] == job["metadata"]["uid"]:
            self.job = None
        self._wrote("delete job")

    async def emit(self, job: Object, event: Event) -> None:
        self.events.setdefault(event.name, event)

    # The rest of a cluster.

    def remove(self, found: Object, grace: int | None = None) -> None:
        """Delete as the API server does: a pod that runs is told to go, everything else goes."""
        runs = found["kind"] == "Pod" and found["status"]["phase"] in ("Running", "Unknown")
        if runs and grace != 0:
            seconds = found["spec"]["terminationGracePeriodSeconds"] if grace is None else grace
            found["metadata"].setdefault("deletionTimestamp", rfc3339(self.clock.now + timedelta(seconds=seconds)))
        else:
            self.objects.pop((found["kind"], found["metadata"]["name"]), None)

    def collect_garbage(self) -> None:
        """Delete what belongs to a job or to an object that is gone, and what belonged to that."""
        owners = {each["metadata"]["uid"] for each in (self.job, *self.objects.values()) if each}
        lost = [key for key, each in self.objects.items() if each["metadata"]["ownerReferences"][0]["uid"] not in owners]
        for key in lost:
            del self.objects[key]
        if lost:
            self.collect_garbage()

    def edit_spec(self, **spec: Any) -> None:
        """The user changes the job."""
        assert self.job is not None
        self.job["spec"] |= spec
        self.job["metadata"]["generation"] += 1
        self._touch(self.job)

    def annotate(self, **annotations: str) -> None:
        """The user annotates the job; an empty value removes the annotation."""
        assert self.job is not None
        kept = {**self.job["metadata"].get("annotations", {}), **annotations}
        self.job["metadata"]["annotations"] = {key: value for key, value in kept.items() if value}
        self._touch(self.job)

    @property
    def status(self) -> Status:
        """The job's status as it is now; read once, since nothing changes a status in its place."""
        assert self.job is not None
        if self._read is None or self._read[0] is not self.job["status"]:
            self._read = self.job["status"], Status.model_validate(self.job["status"])
        return self._read[1]

    @property
    def pods(self) -> list[Object]:
        return [each for each in self.objects.values() if each["kind"] == "Pod"]

    def names(self, kind: str) -> set[str]:
        return {name for each, name in self.objects if each == kind}

    def _touch(self, found: Object) -> None:
        found["metadata"]["resourceVersion"] = str(next(self._numbers))

    def _wrote(self, what: str) -> None:
        self.writes.append(what)
        if self.crash_after is not None and len(self.writes) >= self.crash_after:
            self.crash_after = None
            raise Crash(what)


@dataclass
class FakeKubelet:
    """Runs the pods, and is the trainer in them: each step it does a little of what a head and its workers would do."""

    cluster: FakeCluster
    total_steps: int = 4
    schedulable: Callable[[Object], bool] = lambda pod: True
    """Pods for which this is false stay pending."""
    script: dict[int, Failure] = field(default_factory=dict)
    """Attempts that fail when they have trained one step, and why."""
    saved: int = 0
    """Step of the newest checkpoint; the storage outlives the pods."""
    trained: list[int] = field(default_factory=list)
    """Each step that was done, in order: one that was done twice stands twice."""
    _stages: dict[str, str] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)
    _resumed: dict[str, int] = field(default_factory=dict)

    def step(self) -> None:
        """Some time passes for all pods."""
        for pod in list(self.cluster.pods):
            if "deletionTimestamp" in pod["metadata"]:
                if pod["metadata"]["labels"][LABEL_ROLE] == "head" and pod["metadata"]["uid"] in self._steps:
                    self.saved = max(self.saved, self._steps[pod["metadata"]["uid"]])  # SIGTERM: a checkpoint, then the end
                self.vanish(pod)
            elif pod["status"]["phase"] == "Pending" and self.schedulable(pod):
                pod["status"] = {"phase": "Running", "podIP": "10.0.0.1", "startTime": rfc3339(self.cluster.clock.now)}
            elif pod["status"]["phase"] == "Running" and pod["metadata"]["labels"][LABEL_ROLE] == "head":
                self._train(pod)

    def vanish(self, pod: Object) -> None:
        """The pod is no longer there."""
        self.cluster.objects.pop(("Pod", pod["metadata"]["name"]), None)
        self.cluster.reports.pop(pod["metadata"]["uid"], None)

    def end(self, pod: Object, code: int, message: str = "", reason: str = "Error", **status: Any) -> None:
        """The pod's container ends."""
        phase = "Succeeded" if code == 0 else "Failed"
        pod["status"] = {"phase": phase, "containerStatuses": terminated(code, reason, message), **status}
        self.cluster.reports.pop(pod["metadata"]["uid"], None)

    def _train(self, head: Object) -> None:
        uid, attempt = head["metadata"]["uid"], int(head["metadata"]["labels"][LABEL_ATTEMPT])
        stage = self._stages.setdefault(uid, "Prepare")
        if uid not in self._steps:
            self._steps[uid] = self._resumed[uid] = self.saved
        elif stage == "Prepare":
            self._stages[uid] = "Train"
        elif stage == "Train" and self._workers(attempt) >= 2:
            if attempt in self.script:
                self._report(head, outcome="Failed", failure=self.script[attempt])
                return
            if self._steps[uid] < self.total_steps:  # Else it was lost after its last step.
                self._steps[uid] += 1
                self.trained.append(self._steps[uid])
            self.saved = self._steps[uid] if self._steps[uid] % 2 == 0 else self.saved
            if self._steps[uid] >= self.total_steps:
                self.saved, self._stages[uid] = self._steps[uid], "Publish"
        elif stage == "Publish":
            adapter = Artifact(kind="adapter", uri="pvc://models/bot/adapter", digest="sha256:0", bytes=1)
            self._report(head, outcome="Succeeded", stages=stages("Publish", ended=True), artifacts=(adapter,))
            return
        self._report(head)

    def _workers(self, attempt: int) -> int:
        workers = [pod for pod in self.cluster.pods if pod["metadata"]["labels"][LABEL_ROLE] == "worker"]
        return sum(pod["status"]["phase"] == "Running" and pod["metadata"]["labels"][LABEL_ATTEMPT] == str(attempt) for pod in workers)

    def _report(self, head: Object, **given: Any) -> None:
        meta, stage = head["metadata"], self._stages[head["metadata"]["uid"]]
        step = self._steps[meta["uid"]]
        own = step - self._resumed[meta["uid"]]
        report = Report(
            **{
                "job_uid": meta["labels"][LABEL_JOB_UID],
                "attempt": int(meta["labels"][LABEL_ATTEMPT]),
                "stages": stages(stage),
                "workers_wanted": 2 if stage == "Train" else 0,
                "message": f"step {step} of {self.total_steps}",
                "progress": Progress(step=step, total_steps=self.total_steps, percent=100 * step // self.total_steps),
                "usage": Usage(gpu_seconds=2.0 * own, trained_tokens=100 * own),
                **given,
            }
        )
        if report.outcome:
            self.end(head, 0 if report.outcome == "Succeeded" else 1, termination_message(report), "Completed")
        else:
            self.cluster.reports[meta["uid"]] = report


async def drive(cluster: FakeCluster, kubelet: FakeKubelet, *, until: Callable[[], bool] = lambda: False, rounds: int = 400) -> int:
    """Let operator and kubelet take turns until the operator has nothing left to do, or `until` holds; the number of rounds.

    A crashed operator starts anew. Fails where the two do not come to an end.
    """
    for number in range(rounds):
        if until():
            return number
        try:
            delay = await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
        except Crash:
            continue
        finally:
            cluster.collect_garbage()
        if delay is None:
            return number
        kubelet.step()
        cluster.clock.advance(delay)
    raise AssertionError(f"no end after {rounds} rounds; the status is {cluster.status if cluster.job else None}")


async def told(cluster: FakeCluster) -> None:
    """Let the operator write what waits to be written, while the pods stand still. A crashed operator starts anew."""
    cluster.clock.advance(SETTINGS.poll_seconds)
    while True:
        try:
            await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
            return
        except Crash:
            continue
