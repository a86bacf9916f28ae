"""A player that does what Kueue does to plain pods: holds them back, lets whole groups in, preempts by deleting."""

from dataclasses import dataclass, field

from tests.fakes import FakeCluster, Object

from finetune_operator.times import rfc3339

GATE = "kueue.x-k8s.io/admission"
QUEUE, GROUP, COUNT = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/pod-group-name", "kueue.x-k8s.io/pod-group-total-count"
MANAGED = "kueue.x-k8s.io/managed"
RETRIABLE = "kueue.x-k8s.io/retriable-in-group"


@dataclass
class FakeKueue:
    """One queue with room for so many pods."""

    cluster: FakeCluster
    room: int = 0
    strict: bool = True
    """A group that comes again after it was let in is an error."""
    used: list[str] = field(default_factory=list)
    """Groups that were let in, in order."""

    def __post_init__(self) -> None:
        self.cluster.admit = self.gate

    def gate(self, made: Object) -> None:
        """The webhook: a pod with a queue's name gets a gate."""
        if made["kind"] == "Pod" and made["metadata"]["labels"].get(QUEUE):
            group = made["metadata"]["labels"].get(GROUP)
            assert not self.strict or group not in self.used, f"{group} has been let in before, and ended"
            made["spec"]["schedulingGates"] = [{"name": GATE}]
            made["metadata"]["labels"][MANAGED] = "true"

    def step(self) -> None:
        """Let in the groups that are whole, and the pods without a group, while there is room."""
        for name, pods in sorted(self._waiting().items()):
            whole = len(pods) == int(pods[0]["metadata"].get("annotations", {}).get(COUNT, 1))
            if whole and len(pods) <= self.room - self._running():
                if pods[0]["metadata"]["labels"].get(GROUP):
                    self.used.append(name)
                for pod in pods:
                    del pod["spec"]["schedulingGates"]

    def preempt(self) -> None:
        """Somebody more important needs the room."""
        self.room = 0
        for pod in self._queued():
            if not pod["spec"].get("schedulingGates"):
                condition = {
                    "type": "TerminationTarget",
                    "status": "True",
                    "reason": "Preempted",
                    "message": "to make room for another workload",
                }
                pod["status"].setdefault("conditions", []).append(condition)
                pod["metadata"].setdefault("deletionTimestamp", rfc3339(self.cluster.clock.now))

    def schedulable(self, pod: Object) -> bool:
        """What the scheduler does about gates."""
        return not pod["spec"].get("schedulingGates")

    def _queued(self) -> list[Object]:
        return [pod for pod in self.cluster.pods if pod["metadata"]["labels"].get(QUEUE)]

    def _waiting(self) -> dict[str, list[Object]]:
        groups: dict[str, list[Object]] = {}
        for pod in self._queued():
            if pod["spec"].get("schedulingGates") and "deletionTimestamp" not in pod["metadata"]:
                groups.setdefault(pod["metadata"]["labels"].get(GROUP, pod["metadata"]["name"]), []).append(pod)
        return groups

    def _running(self) -> int:
        return sum(not pod["spec"].get("schedulingGates") and pod["status"]["phase"] in ("Pending", "Running") for pod in self._queued())
