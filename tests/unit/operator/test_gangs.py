"""Workers as one gang: queued, let in, preempted, and what each scheduler reads from the pods."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.builders import SETTINGS, Clock, at, make_job, make_pod, make_report, raw_job, raw_pod, terminated
from tests.fake_kueue import COUNT, GROUP, MANAGED, QUEUE, RETRIABLE, FakeKueue
from tests.fakes import KEY, FakeCluster, FakeKubelet
from tests.unit.operator.looks import condition

from finetune_api.status import Status
from finetune_operator.lifecycle import advance
from finetune_operator.observed import Observed, Pod, pod_from
from finetune_operator.plan import desired_objects, surplus
from finetune_operator.reconcile import reconcile
from finetune_operator.settings import settings_from
from finetune_operator.times import rfc3339

LABELS = {QUEUE: "gpu", "kueue.x-k8s.io/priority-class": "low"}


def world(**spec: Any) -> tuple[FakeCluster, FakeKubelet, FakeKueue]:
    cluster = FakeCluster(Clock(), raw_job(labels=LABELS, **spec))
    kueue = FakeKueue(cluster)
    return cluster, FakeKubelet(cluster, schedulable=kueue.schedulable), kueue


async def drive(cluster: FakeCluster, kubelet: FakeKubelet, kueue: FakeKueue, until: Callable[[], bool] = lambda: False) -> None:
    """All take turns until the job has ended, or `until` holds."""
    for _ in range(300):
        if until():
            return
        delay = await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
        cluster.collect_garbage()
        if delay is None:
            return
        kueue.step()
        kubelet.step()
        cluster.clock.advance(delay)
    raise AssertionError(f"no end: {cluster.status}")


async def test_a_job_waits_in_the_queue_and_runs_when_it_is_let_in() -> None:
    cluster, kubelet, kueue = world(activeDeadlineSeconds=1000, preRunningDeadlineSeconds=60)
    await drive(cluster, kubelet, kueue, until=lambda: cluster.status.phase == "Queued")
    assert cluster.status.message == "a queue holds back 2 pods: kueue.x-k8s.io/admission"
    assert condition(cluster.status, "Reconciling") == ("True", "Queued")
    assert kubelet.trained == []
    cluster.clock.advance(10_000)
    await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
    assert cluster.status.phase == "Queued", "neither deadline counts time in the queue"
    kueue.room = 1
    kueue.step()
    await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
    assert cluster.status.phase == "Queued", "both or none"
    kueue.room = 2
    await drive(cluster, kubelet, kueue)
    assert (cluster.status.phase, cluster.status.attempt.number, kubelet.trained) == ("Complete", 1, [1, 2, 3, 4])
    assert (kueue.used, cluster.status.queued_time) == (["bot-1-1"], None)
    assert cluster.status.suspended_seconds >= 10_000


async def test_a_preempted_job_is_queued_again_with_a_group_of_its_own() -> None:
    cluster, kubelet, kueue = world(backoffLimit=0)
    kueue.room = 2
    await drive(cluster, kubelet, kueue, until=lambda: kubelet.trained == [1, 2])
    kueue.preempt()
    await drive(cluster, kubelet, kueue, until=lambda: cluster.status.phase == "Queued")
    attempt = cluster.status.attempt
    assert (attempt.number, attempt.preemptions, attempt.failures, attempt.end_reason) == (2, 1, 0, "Preempted")
    assert "to make room for another workload" in (attempt.end_message or "")
    kueue.room = 2
    await drive(cluster, kubelet, kueue)
    assert (cluster.status.phase, kubelet.trained, kueue.used) == ("Complete", [1, 2, 3, 4], ["bot-1-1", "bot-2-1"])
    assert list(cluster.objects) == [("Pod", "bot-2-head")]


async def test_the_head_is_let_through_and_the_workers_are_one_group() -> None:
    cluster, kubelet, kueue = world()
    await drive(cluster, kubelet, kueue, until=lambda: cluster.status.phase == "Queued")
    pods = {pod["metadata"]["name"]: pod["metadata"] for pod in cluster.pods}
    assert QUEUE not in pods["bot-1-head"]["labels"]
    for name in ("bot-1-worker-0", "bot-1-worker-1"):
        assert {key: value for key, value in pods[name]["labels"].items() if "kueue" in key} == {
            **LABELS,
            GROUP: "bot-1-1",
            MANAGED: "true",
        }
        assert pods[name]["annotations"] == {COUNT: "2", RETRIABLE: "false"}


# Single looks.


def training(**spec: Any) -> Status:
    """A queued job whose two workers run."""
    status = look(Status())
    status = look(status, make_pod(), report=make_report("Train"), now=5, **spec)
    return look(status, make_pod(), *workers(), report=make_report("Train"), now=10, **spec)


def workers(**given: Any) -> tuple[Pod, Pod]:
    return make_pod("worker", index=0), make_pod("worker", index=1, **given)


def look(before: Status, *pods: Pod, now: float = 0, report: Any = None, **spec: Any) -> Status:
    job = make_job(status=before, labels=LABELS, **spec)
    after = advance(job, Observed(pods, frozenset({1}), report), SETTINGS, at(now))
    assert advance(replace(job, status=after), Observed(pods, frozenset({1}), report), SETTINGS, at(now)) == after
    return after


def test_a_worker_that_is_gone_ends_the_attempt_of_a_gang() -> None:
    assert training().attempt.gang_seen
    for left in ((make_pod(), workers()[0]), (make_pod(), *workers(deletion=at(100)))):
        status = look(training(), *left, report=make_report("Train"), now=60)
        assert (status.attempt.running, status.attempt.preemptions, status.attempt.failures) == (False, 1, 0)


def test_a_group_that_was_let_in_is_lost_though_it_was_never_seen_whole() -> None:
    """The operator was away while the queue let it in, and one of its workers went."""
    wanted = look(look(Status()), make_pod(), report=make_report("Train"), now=5)
    assert (wanted.workers_wanted, wanted.attempt.gang_seen) == (2, False)
    managed = raw_pod("worker", index=0)
    managed["metadata"]["labels"]["kueue.x-k8s.io/managed"] = "true"
    assert look(wanted, make_pod(), workers()[0], report=make_report("Train"), now=60).attempt.running, "the other one is still to be made"
    assert not look(wanted, make_pod(), pod_from(managed), report=make_report("Train"), now=60).attempt.running


def test_a_worker_that_fails_by_itself_is_a_failure() -> None:
    """Or a job whose workers need more memory than they have would be queued without end."""
    dead = make_pod("worker", index=1, phase="Failed", containerStatuses=terminated(137, "OOMKilled"))
    status = look(training(), make_pod(), workers()[0], dead, report=make_report("Train"), now=60)
    assert status.failure is not None
    assert (status.attempt.failures, status.attempt.preemptions, status.failure.reason) == (1, 0, "OOMKilled")


def test_a_worker_beyond_the_gang_is_replaced() -> None:
    spec = {"compute": {"workers": {"min": 1, "max": 2}}}
    status = look(training(**spec), make_pod(), workers()[0], report=make_report("Train"), now=60, **spec)
    assert (status.attempt.running, status.phase) == (True, "Training")
    gated = make_pod(
        "worker", index=1, phase="Pending", conditions=[{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]
    )
    status = look(status, make_pod(), workers()[0], gated, report=make_report("Train"), now=70, **spec)
    assert status.phase == "Training", "it goes on with the workers that it has"
    pods = desired_objects(make_job(status=status, labels=LABELS, **spec), status, SETTINGS)[-2:]
    assert [pod["metadata"]["labels"].get(GROUP) for pod in pods] == ["bot-1-1", None]
    assert {pod["metadata"]["labels"][QUEUE] for pod in pods} == {"gpu"}


def test_workers_that_are_wanted_again_are_another_group() -> None:
    status = look(training(), make_pod(), report=make_report("Train", workers_wanted=0), now=60)
    assert (status.attempt.running, status.attempt.gangs) == (True, 1)
    status = look(status, make_pod(), report=make_report("Train"), now=70)
    assert (status.attempt.running, status.attempt.gangs, status.attempt.gang_seen) == (True, 2, False)


def test_suspending_in_the_queue_counts_the_time_once() -> None:
    waits = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]}
    gated = tuple(make_pod("worker", index=index, phase="Pending", **waits) for index in (0, 1))
    status = look(look(Status()), make_pod(), *gated, report=make_report("Train"), now=100)
    assert (status.phase, status.queued_time) == ("Queued", rfc3339(at(100)))
    status = look(status, make_pod(), *gated, report=make_report("Train"), now=200, suspend=True)
    status = look(status, now=210, suspend=True)
    status = look(status, now=1210)
    assert (status.suspended_seconds, status.queued_time, status.attempt.number) == (100 + 1000, None, 2)


# Other schedulers.


@pytest.mark.parametrize(
    ("scheduler", "api", "name", "spec"),
    [
        ("volcano", "scheduling.volcano.sh/v1beta1", "volcano", {"minMember": 2, "queue": "team"}),
        ("scheduler-plugins", "scheduling.x-k8s.io/v1alpha1", "scheduler-plugins-scheduler", {"minMember": 2}),
    ],
)
def test_a_pod_group_is_made_and_named_by_the_workers(scheduler, api, name, spec) -> None:
    settings = replace(SETTINGS, gang_scheduler=scheduler)
    job = make_job(status=training(), labels={"volcano.sh/queue-name": "team"})
    made = desired_objects(job, job.status, settings)
    (group,) = [each for each in made if each["kind"] == "PodGroup"]
    assert (group["apiVersion"], group["metadata"]["name"], group["spec"]) == (api, "bot-1", spec)
    head, *pods = [each for each in made if each["kind"] == "Pod"]
    assert made.index(group) < made.index(head)
    assert "schedulerName" not in head["spec"]
    for pod in pods:
        assert pod["spec"]["schedulerName"] == name
        marks = {**pod["metadata"]["labels"], **pod["metadata"].get("annotations", {})}
        assert marks["scheduling.k8s.io/group-name" if scheduler == "volcano" else "scheduling.x-k8s.io/pod-group"] == "bot-1"
    gone = surplus((), replace(job, status=Status()), Status(), Observed((), frozenset({1})), settings, at(0))
    assert [removal.kind for removal in gone] == ["PodGroup", "Secret", "Service", "NetworkPolicy", "ConfigMap"]


def test_without_a_scheduler_pods_carry_nothing() -> None:
    job = make_job(status=training(), labels=LABELS)
    for pod in desired_objects(job, job.status, replace(SETTINGS, gang_scheduler="none"))[-3:]:
        assert not [key for key in pod["metadata"]["labels"] if "kueue" in key]
        assert "annotations" not in pod["metadata"]


def test_an_unknown_scheduler_is_refused(tmp_path) -> None:
    (tmp_path / "key").write_text("a key of 16 bytes or more")
    env = {"FINETUNE_TOKEN_KEY_FILE": str(tmp_path / "key")}
    assert settings_from(env).gang_scheduler == "kueue"
    assert settings_from({**env, "FINETUNE_GANG_SCHEDULER": "volcano"}).gang_scheduler == "volcano"
    with pytest.raises(ValueError, match="FINETUNE_GANG_SCHEDULER must be one of none, kueue, volcano, scheduler-plugins, not 'yunikorn'"):
        settings_from({**env, "FINETUNE_GANG_SCHEDULER": "yunikorn"})
