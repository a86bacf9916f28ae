"""Random faults in random order: whatever happens, the job comes to an end, and on the way nothing is ever there twice.

A schedule is some undisturbed turns, up to 40 random steps, with every invariant checked before the first and after each, and then as many
turns without faults as the job takes to end. FINETUNE_FAULT_SCHEDULES says how many schedules are tried, and half as many with a queue.
"""

import functools
import json
import os
import pickle
from collections.abc import Coroutine, Mapping
from hashlib import blake2b
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.builders import SETTINGS, Clock, raw_job
from tests.fake_kueue import QUEUE, FakeKueue
from tests.fakes import KEY, Crash, FakeCluster, FakeKubelet, Object

from finetune_api import LABEL_ATTEMPT, LABEL_ROLE
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_operator import observed as looking
from finetune_operator.lifecycle import advance
from finetune_operator.observed import job_from, observe
from finetune_operator.reconcile import reconcile

BACKOFF_LIMIT = 2
DISRUPTED = [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never has to wait, as on the fake cluster."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("the fake cluster made the operator wait")


@functools.cache
def _parsed(text: str, local: bool) -> FineTuneJob:
    return parse_job(json.loads(text), local=local)


def parse_once(manifest: Mapping[str, Any], *, local: bool = False) -> FineTuneJob:
    """`parse_job`, done once for each manifest: its result is frozen, and else it would take a quarter of all the time of schedules.

    The resource version counts for no part of the result that `job_from` uses.
    """
    metadata = {key: value for key, value in manifest["metadata"].items() if key != "resourceVersion"}
    return _parsed(json.dumps({**manifest, "metadata": metadata}), local)


_SETTLED: set[bytes] = set()
"""Digests of the states of which it is known that what was decided on them stays decided."""


def digest(cluster: FakeCluster) -> bytes:
    """Of all that a decision on a cluster's job is made from. Equal states have mostly equal digests, others never."""
    assert cluster.job is not None
    metadata = {key: value for key, value in cluster.job["metadata"].items() if key != "resourceVersion"}
    state = ({**cluster.job, "metadata": metadata}, cluster.objects, cluster.clock.now)
    return blake2b(pickle.dumps(state), digest_size=16).digest()


class Faults(RuleBasedStateMachine):
    """A job, its user, its cluster and its operator, all of them unreliable."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = FakeCluster(Clock(), raw_job(backoffLimit=BACKOFF_LIMIT))
        self.kubelet = FakeKubelet(self.cluster, total_steps=10)

    def operate(self) -> float | None:
        try:
            return run(reconcile(KEY, self.cluster, SETTINGS, self.cluster.clock.now))
        except Crash:
            return 1.0

    @initialize(turns=st.integers(0, 16))
    def the_job_has_run_for_a_while(self, turns: int) -> None:
        """Faults come at every point of a life: an undisturbed one takes 16 turns."""
        self.go_on(turns)

    @rule(turns=st.integers(1, 6))
    def all_goes_well_for_a_while(self, turns: int) -> None:
        self.go_on(turns)

    @rule()
    def operator_looks(self) -> None:
        self.operate()

    @rule(write=st.integers(1, 8))
    def operator_crashes(self, write: int) -> None:
        self.cluster.crash_after = len(self.cluster.writes) + write
        self.operate()
        self.cluster.crash_after = None

    @rule()
    def another_operator_wins(self) -> None:
        """Between this operator's read and its write, another one has done all of its work."""
        first = iter([True])

        def other() -> None:
            if next(first, False):
                self.operate()

        self.cluster.before_patch = other
        self.operate()
        self.cluster.before_patch = lambda: None

    @rule(seconds=st.sampled_from([1, 5, 15, 100]))
    def time_passes(self, seconds: int) -> None:
        self.cluster.clock.advance(seconds)

    @rule()
    def pods_go_on(self) -> None:
        self.kubelet.step()

    @rule()
    def garbage_is_collected(self) -> None:
        self.cluster.collect_garbage()

    @rule(index=st.integers(0, 2))
    def a_pod_vanishes(self, index: int) -> None:
        if pod := self.pod(index):
            self.kubelet.vanish(pod)

    @rule(index=st.integers(0, 2), code=st.sampled_from([1, 137, 139, 143]))
    def a_pod_fails(self, index: int, code: int) -> None:
        if (pod := self.pod(index)) and pod["status"]["phase"] == "Running":
            self.kubelet.end(pod, code)

    @rule(index=st.integers(0, 2))
    def a_pod_is_evicted(self, index: int) -> None:
        if (pod := self.pod(index)) and pod["status"]["phase"] == "Running":
            self.kubelet.end(pod, 143, conditions=DISRUPTED)

    @rule(index=st.integers(0, 2))
    def a_pod_is_deleted_by_somebody(self, index: int) -> None:
        if pod := self.pod(index):
            self.cluster.remove(pod)

    @rule(suspend=st.booleans())
    def the_user_suspends_or_resumes(self, suspend: bool) -> None:
        self.cluster.edit_spec(suspend=suspend)

    @rule(value=st.sampled_from(["", "a", "b", "c"]))
    def the_user_asks_for_a_retry(self, value: str) -> None:
        self.cluster.annotate(**{"finetune.dev/retry": value})

    @rule(value=st.sampled_from(["", "true"]))
    def the_user_cancels_or_takes_it_back(self, value: str) -> None:
        self.cluster.annotate(**{"finetune.dev/cancel": value})

    @rule(value=st.sampled_from(["", "disabled"]))
    def somebody_pauses_the_job_or_lets_it_go_on(self, value: str) -> None:
        self.cluster.annotate(**{"finetune.dev/reconcile": value})

    @rule()
    @precondition(lambda self: not self.cluster.status.finished)
    def the_quota_is_used_up_for_a_moment(self) -> None:
        self.cluster.refuse = lambda manifest: "exceeded quota" if manifest["kind"] == "Pod" else None
        self.operate()
        self.cluster.refuse = lambda manifest: None

    def pod(self, index: int) -> Object | None:
        pods = sorted(self.cluster.pods, key=lambda pod: pod["metadata"]["name"])
        return pods[index] if index < len(pods) else None

    @invariant()
    def no_two_heads_live(self) -> None:
        heads = [pod for pod in self.cluster.pods if pod["metadata"]["labels"][LABEL_ROLE] == "head"]
        assert sum(pod["status"]["phase"] in ("Pending", "Running") for pod in heads) <= 1

    @invariant()
    def no_two_attempts_live(self) -> None:
        alive = [pod for pod in self.cluster.pods if pod["status"]["phase"] in ("Pending", "Running")]
        assert len({pod["metadata"]["labels"][LABEL_ATTEMPT] for pod in alive}) <= 1

    @invariant()
    def failures_are_bounded(self) -> None:
        attempt = self.cluster.status.attempt
        assert attempt.failures - attempt.forgiven_failures <= BACKOFF_LIMIT + 1

    @invariant()
    def suspended_means_that_no_pod_runs(self) -> None:
        if self.cluster.status.phase == "Suspended":
            assert not [pod for pod in self.cluster.pods if pod["status"]["phase"] in ("Pending", "Running")]

    @invariant()
    def complete_means_that_the_result_is_published(self) -> None:
        if self.cluster.status.phase == "Complete":
            assert self.cluster.status.artifacts

    @invariant()
    def a_status_that_was_decided_stays_decided(self) -> None:
        if (state := digest(self.cluster)) in _SETTLED:
            return  # A decision follows from the state alone.
        raw = run(self.cluster.read(KEY))
        job = job_from(raw.job)
        observed = observe(job.name, job.uid, raw.pods, raw.config_maps, raw.events)
        once = advance(job, observed, SETTINGS, self.cluster.clock.now)
        again = advance(job_from({**raw.job, "status": once.to_json()}), observed, SETTINGS, self.cluster.clock.now)
        assert again == once
        _SETTLED.add(state)

    def pods_pass_time(self) -> None:
        """When there are no faults."""
        self.kubelet.step()

    def go_on(self, turns: int) -> None:
        """So many turns of operator and pods without a fault, or until the operator has nothing left to do."""
        for _ in range(turns):
            if (delay := self.operate()) is None:
                return
            self.pods_pass_time()
            self.cluster.clock.advance(delay)

    def teardown(self) -> None:
        """The faults end, and the user wants the job to run: it ends, and leaves one finished head at most."""
        self.cluster.edit_spec(suspend=False)
        self.cluster.annotate(**dict.fromkeys(("finetune.dev/retry", "finetune.dev/cancel", "finetune.dev/reconcile"), ""))
        self.go_on(500)
        self.cluster.collect_garbage()
        status = self.cluster.status
        assert status.phase in ("Complete", "Failed"), status
        assert set(self.cluster.objects) <= {("Pod", f"bot-{status.attempt.number}-head")}
        assert not [pod for pod in self.cluster.pods if pod["status"]["phase"] in ("Pending", "Running")]


class QueuedFaults(Faults):
    """The same with Kueue, which lets the workers in and takes them away."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster.job = raw_job(backoffLimit=BACKOFF_LIMIT, labels={QUEUE: "gpu"})
        self.kueue = FakeKueue(self.cluster, room=2, strict=False)
        self.kubelet.schedulable = self.kueue.schedulable

    @rule()
    def the_queue_lets_in(self) -> None:
        self.kueue.room = 2
        self.kueue.step()

    @rule()
    def the_queue_preempts(self) -> None:
        self.kueue.preempt()

    def pods_pass_time(self) -> None:
        self.kueue.room = 2
        self.kueue.step()
        super().pods_pass_time()


SCHEDULES = int(os.environ.get("FINETUNE_FAULT_SCHEDULES", "30"))
"""Random schedules that are tried; those of `make test` are the same each time."""
PROFILE = settings(
    max_examples=SCHEDULES,
    stateful_step_count=40,
    deadline=None,
    derandomize=SCHEDULES <= 30,
    suppress_health_check=[HealthCheck.too_slow],
)


class TestFaults(Faults.TestCase):
    settings = PROFILE

    def setUp(self) -> None:
        super().setUp()
        self.enterContext(mock.patch.object(looking, "parse_job", parse_once))


class TestQueuedFaults(QueuedFaults.TestCase):
    settings = settings(PROFILE, max_examples=max(SCHEDULES // 2, 1))

    def setUp(self) -> None:
        super().setUp()
        self.enterContext(mock.patch.object(looking, "parse_job", parse_once))
