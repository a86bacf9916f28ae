"""The loop on a cluster in memory: state in, state out. Crashes, conflicts and a second operator change nothing about the end."""

import pytest
from tests.builders import SETTINGS, UID, Clock, make_report, raw_job
from tests.fakes import KEY, Crash, FakeCluster, FakeKubelet, drive, told

from finetune_api.reasons import Reason
from finetune_api.status import Failure, Status, Usage
from finetune_operator.pace import SOON_SECONDS
from finetune_operator.reconcile import CHANGES_PER_TURN, reconcile


def world(**spec) -> tuple[FakeCluster, FakeKubelet]:
    cluster = FakeCluster(Clock(), raw_job(**spec))
    return cluster, FakeKubelet(cluster)


def outcome(status: Status) -> dict[str, object]:
    """What a user sees at the end, without the times."""
    assert status.progress is not None
    assert status.usage is not None
    return {
        "phase": status.phase,
        "step": status.progress.step,
        "artifacts": [artifact.uri for artifact in status.artifacts],
        "stages": [(stage.name, stage.state) for stage in status.stages],
        "conditions": {condition.type: (condition.status, condition.reason) for condition in status.conditions},
        "attempt": (status.attempt.number, status.attempt.failures, status.attempt.preemptions),
        "tokens": status.usage.trained_tokens,
    }


async def test_a_job_goes_all_the_way() -> None:
    cluster, kubelet = world()
    await drive(cluster, kubelet)

    assert outcome(cluster.status) == {
        "phase": "Complete",
        "step": 4,
        "artifacts": ["pvc://models/bot/adapter"],
        "stages": [("Prepare", "Succeeded"), ("Train", "Succeeded"), ("Evaluate", "Succeeded"), ("Publish", "Succeeded")],
        "conditions": {
            "Accepted": ("True", "Accepted"),
            "DataReady": ("True", "Succeeded"),
            "WorkersReady": ("Unknown", "Pending"),
            "Trained": ("True", "Succeeded"),
            "Evaluated": ("True", "Succeeded"),
            "Published": ("True", "Succeeded"),
            "Complete": ("True", "Succeeded"),
            "Failed": ("False", "Succeeded"),
            "Suspended": ("False", "Succeeded"),
            "Ready": ("True", "Succeeded"),
            "Reconciling": ("False", "Succeeded"),
            "Stalled": ("False", "Succeeded"),
        },
        "attempt": (1, 0, 0),
        "tokens": 400,
    }
    # The head's log can be read; nothing else is left.
    assert list(cluster.objects) == [("Pod", "bot-1-head")]
    assert cluster.made.count(("Pod", "bot-1-head")) == 1


async def test_the_events_tell_the_way_once() -> None:
    cluster, kubelet = world()
    await drive(cluster, kubelet)
    assert [(event.type, event.reason) for event in cluster.events.values()] == [
        ("Normal", "Accepted"),
        ("Normal", "Succeeded"),
    ]


async def test_the_status_is_written_before_anything_is_made() -> None:
    cluster, _ = world()
    await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
    assert cluster.writes == [
        "patch status",
        "apply ConfigMap bot-1",
        "apply Secret bot-1-c53e4c4d",
        "apply Service bot-1",
        "apply NetworkPolicy bot-1",
        "apply Pod bot-1-head",
    ]


async def test_workers_exist_only_while_they_are_wanted() -> None:
    cluster, kubelet = world()
    seen = []
    while not cluster.status.finished:
        await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
        wanted = cluster.status.workers_wanted
        running = {pod["metadata"]["name"] for pod in cluster.pods if "deletionTimestamp" not in pod["metadata"]} - {"bot-1-head"}
        assert running == {f"bot-1-worker-{index}" for index in range(wanted)}
        seen.append(wanted)
        kubelet.step()
        cluster.clock.advance(2)
    assert sorted(set(seen)) == [0, 2]
    assert (seen[0], seen[-1]) == (0, 0)


async def test_a_large_job_is_made_and_removed_in_parts() -> None:
    """No turn is long, and the next one comes soon."""
    cluster, kubelet = world(compute={"workers": {"min": 250, "max": 250}}, training={"globalBatchSize": 250})
    await drive(cluster, kubelet, until=lambda: bool(cluster.reports))
    (head,) = cluster.pods
    cluster.reports[head["metadata"]["uid"]] = make_report("Train", workers_wanted=250)
    made = []
    while len(cluster.pods) < 1 + 250:
        before = len(cluster.pods)
        assert await reconcile(KEY, cluster, SETTINGS, cluster.clock.now) == SOON_SECONDS
        made.append(len(cluster.pods) - before)
    assert made == [CHANGES_PER_TURN, CHANGES_PER_TURN, 250 - 2 * CHANGES_PER_TURN]
    cluster.edit_spec(suspend=True)
    await drive(cluster, kubelet, until=lambda: cluster.status.phase == "Suspended" and not cluster.objects)


async def test_nothing_is_written_while_nothing_changes() -> None:
    cluster, kubelet = world()
    await drive(cluster, kubelet, until=lambda: cluster.status.phase == "Training" and cluster.status.workers_ready == 2)
    await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
    cluster.writes.clear()
    for _ in range(20):
        assert await reconcile(KEY, cluster, SETTINGS, cluster.clock.now) == SETTINGS.poll_seconds
        cluster.clock.advance(SETTINGS.poll_seconds)
    assert cluster.writes == []


async def test_the_whole_way_costs_few_writes() -> None:
    cluster, kubelet = world()
    await drive(cluster, kubelet)
    patches = cluster.writes.count("patch status")
    # 4 objects and 3 pods are made; the workers deleted at once, and the ConfigMap with what belongs to it.
    assert len(cluster.writes) - patches == 7 + 2
    assert patches <= 12


async def _whole_life(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    await drive(cluster, kubelet)


async def _suspended_and_resumed(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1])
    cluster.edit_spec(suspend=True)
    await drive(cluster, kubelet)
    assert (cluster.status.phase, cluster.objects) == ("Suspended", {})
    cluster.edit_spec(suspend=False)
    await drive(cluster, kubelet)


async def _fails_once(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    kubelet.script = {1: Failure(stage="Train", reason="GPUOutOfMemory", message="CUDA out of memory", retryable=True)}
    await drive(cluster, kubelet)


async def _fails_for_good(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    kubelet.script = {1: Failure(stage="Train", reason="TrainingDiverged", message="loss is NaN", retryable=False)}
    await drive(cluster, kubelet)


async def _loses_its_head(cluster: FakeCluster, kubelet: FakeKubelet) -> None:
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1, 2])
    await told(cluster)
    kubelet.vanish(cluster.objects["Pod", "bot-1-head"])
    await drive(cluster, kubelet)


LIVES = {
    "all goes well": (_whole_life, 1, [1, 2, 3, 4]),
    "suspended and resumed": (_suspended_and_resumed, 2, [1, 2, 3, 4]),
    "an attempt fails": (_fails_once, 2, [1, 2, 3, 4]),
    "the job fails": (_fails_for_good, 1, []),
    "the head is lost": (_loses_its_head, 2, [1, 2, 3, 4]),
}


@pytest.mark.parametrize(("live", "attempts", "trained"), LIVES.values(), ids=LIVES)
async def test_a_crash_after_any_write_does_no_harm(live, attempts, trained) -> None:
    undisturbed, kubelet = world()
    await live(undisturbed, kubelet)
    assert (undisturbed.status.attempt.number, kubelet.trained) == (attempts, trained)
    assert list(undisturbed.objects) == [("Pod", f"bot-{attempts}-head")]
    for number in range(1, len(undisturbed.writes) + 1):
        cluster, kubelet = world()
        cluster.crash_after = number
        await live(cluster, kubelet)
        assert cluster.crash_after is None, "the operator did not come as far as this write"
        assert outcome(cluster.status) == outcome(undisturbed.status), f"after a crash at write {number}"
        assert list(cluster.objects) == list(undisturbed.objects)
        assert sorted(set(cluster.made)) == sorted(cluster.made), f"made twice after a crash at write {number}"
        assert kubelet.trained == trained


async def test_a_job_that_is_suspended_after_a_crash_leaves_no_secret() -> None:
    """The Secret exists and the head does not: only the ConfigMap, made first, tells that there is something to remove."""
    for number in range(1, 7):
        cluster, kubelet = world()
        cluster.crash_after = number
        with pytest.raises(Crash):
            await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
        cluster.edit_spec(suspend=True)
        await drive(cluster, kubelet)
        assert (cluster.status.phase, cluster.objects) == ("Suspended", {})


async def test_two_operators_do_no_harm() -> None:
    """One is always a read behind: it decides on what the other has just changed."""
    cluster, kubelet = world()
    while not cluster.status.finished:
        read = await cluster.read(KEY)
        await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
        await reconcile(KEY, Stale(cluster, read), SETTINGS, cluster.clock.now)
        kubelet.step()
        cluster.clock.advance(2)
    await drive(cluster, kubelet)
    assert outcome(cluster.status)["attempt"] == (1, 0, 0)
    assert list(cluster.objects) == [("Pod", "bot-1-head")]
    assert cluster.made.count(("Pod", "bot-1-head")) == 1
    assert kubelet.trained == [1, 2, 3, 4]


class Stale:
    """The cluster, to an operator that has read it some time ago."""

    def __init__(self, cluster: FakeCluster, read) -> None:
        self._cluster, self._read = cluster, read

    async def read(self, key):
        return self._read

    def __getattr__(self, name: str):
        return getattr(self._cluster, name)


async def test_a_conflict_is_read_again_and_the_users_change_is_kept() -> None:
    cluster, kubelet = world()
    edits = iter([{"suspend": True}])
    cluster.before_patch = lambda: [cluster.edit_spec(**edit) for edit in edits]
    assert await reconcile(KEY, cluster, SETTINGS, cluster.clock.now) == 2.0
    assert (cluster.objects, cluster.status) == ({}, Status())
    await drive(cluster, kubelet)
    assert cluster.status.phase == "Suspended"
    assert cluster.made == []


async def test_a_lost_head_costs_a_preemption_and_the_next_attempt_goes_on() -> None:
    cluster, kubelet = world()
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1, 2, 3])
    kubelet.vanish(cluster.objects["Pod", "bot-1-head"])
    await drive(cluster, kubelet)
    attempt = cluster.status.attempt
    assert (attempt.number, attempt.failures, attempt.preemptions, attempt.end_reason) == (2, 0, 1, "HeadLost")
    assert kubelet.trained == [1, 2, 3, 3, 4]
    # Two steps of each attempt were reported: the first one's third went with its head.
    assert cluster.status.usage == Usage(trained_tokens=400)
    assert list(cluster.objects) == [("Pod", "bot-2-head")]


async def test_a_failed_worker_is_made_again_and_the_attempt_goes_on() -> None:
    cluster, kubelet = world()
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1])
    kubelet.end(cluster.objects["Pod", "bot-1-worker-0"], 137)
    await drive(cluster, kubelet)
    assert cluster.status.attempt.number == 1
    assert cluster.made.count(("Pod", "bot-1-worker-0")) == 2
    assert cluster.status.phase == "Complete"
    assert [event.reason for event in cluster.events.values()].count("WorkersLost") == 1


async def test_failures_are_retried_as_often_as_the_user_allows() -> None:
    cluster, kubelet = world(backoffLimit=2)
    why = Failure(stage="Train", reason="GPUOutOfMemory", message="CUDA out of memory", retryable=True)
    kubelet.script = {1: why, 2: why, 3: why, 4: why}
    await drive(cluster, kubelet)
    status = cluster.status
    failed = status.condition("Failed")
    assert failed is not None
    assert (failed.status, failed.reason) == ("True", "BackoffLimitExceeded")
    assert (status.attempt.number, status.attempt.failures) == (3, 3)
    assert status.failure is not None
    assert (status.failure.reason, status.failure.pod, status.failure.exit_code) == ("GPUOutOfMemory", "bot-3-head", 1)
    assert list(cluster.objects) == [("Pod", "bot-3-head")]


async def test_a_failure_that_cannot_be_helped_is_not_retried() -> None:
    cluster, kubelet = world()
    kubelet.script = {1: Failure(stage="Train", reason="TrainingDiverged", message="loss is NaN at step 7", retryable=False)}
    await drive(cluster, kubelet)
    assert (cluster.status.phase, cluster.status.attempt.number, cluster.status.message) == ("Failed", 1, "loss is NaN at step 7")


async def test_what_the_api_server_refuses_is_said_until_it_takes_it() -> None:
    cluster, kubelet = world()
    quota = "exceeded quota: gpus, requested: 1, used: 8, limited: 8"
    cluster.refuse = lambda manifest: quota if manifest["metadata"]["name"] == "bot-1-worker-1" else None
    await drive(cluster, kubelet, until=lambda: cluster.status.workers_ready == 1)
    for _ in range(3):
        assert await reconcile(KEY, cluster, SETTINGS, cluster.clock.now) == SETTINGS.poll_seconds
        ready = cluster.status.condition("WorkersReady")
        assert ready is not None
        assert (ready.status, ready.reason, ready.message) == ("False", "QuotaExceeded", f"1 of 2 workers run; {quota}")
        assert cluster.status.message == quota
        cluster.clock.advance(10)
    cluster.writes.clear()
    await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
    assert cluster.writes == ["refused Pod bot-1-worker-1"]

    cluster.refuse = lambda manifest: None
    await drive(cluster, kubelet)
    assert cluster.status.phase == "Complete"
    assert cluster.status.attempt.number == 1


async def test_what_is_refused_for_too_long_fails_the_job() -> None:
    cluster, kubelet = world(preRunningDeadlineSeconds=60)
    cluster.refuse = lambda manifest: 'pods "bot-1-head" is forbidden' if manifest["kind"] == "Pod" else None
    await drive(cluster, kubelet)
    assert cluster.status.failure is not None
    assert (cluster.status.phase, cluster.status.failure.reason) == ("Failed", "Forbidden")
    assert cluster.objects == {}


async def test_workers_that_never_come_fail_the_job_and_nothing_holds_a_gpu() -> None:
    cluster, kubelet = world(preRunningDeadlineSeconds=60)
    kubelet.schedulable = lambda pod: not pod["metadata"]["name"].endswith("worker-1")
    await drive(cluster, kubelet)
    assert (cluster.status.phase, cluster.status.condition("Failed").reason) == ("Failed", Reason.PRE_RUNNING_DEADLINE_EXCEEDED)
    assert cluster.objects == {}


async def test_a_finished_job_is_deleted_after_its_time() -> None:
    cluster, kubelet = world(ttlSecondsAfterFinished=3600)
    await drive(cluster, kubelet)
    assert (cluster.job, cluster.objects) == (None, {})
    assert cluster.writes[-1] == "delete job"


async def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    cluster, _ = world()
    cluster.job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert await reconcile(KEY, cluster, SETTINGS, cluster.clock.now) is None
    assert cluster.writes == []


async def test_a_deleted_job_that_a_finalizer_holds_up_lets_go_of_its_pods() -> None:
    """Kubernetes would remove them only after the job itself."""
    cluster, kubelet = world()
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1])
    cluster.job["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["example.com/accounting"]}
    cluster.writes.clear()
    assert await reconcile(KEY, cluster, SETTINGS, cluster.clock.now) is None
    assert cluster.writes == ["delete Pod bot-1-head", "delete pods"]
    kubelet.step()
    await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
    assert (cluster.pods, cluster.status.phase) == ([], "Training")
    assert len(cluster.writes) == 2, "nothing is asked for twice"


async def test_a_job_of_the_same_name_does_not_get_the_pods_of_the_one_before() -> None:
    cluster, kubelet = world()
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1])
    before = {pod["metadata"]["uid"] for pod in cluster.pods}
    cluster.job = raw_job(uid="another")
    cluster.collect_garbage()
    await drive(cluster, kubelet)
    assert cluster.status.phase == "Complete"
    assert not before & {pod["metadata"]["uid"] for pod in cluster.pods}
    assert UID not in {pod["metadata"]["labels"]["finetune.dev/job-uid"] for pod in cluster.pods}


async def test_a_spec_that_cannot_be_understood_fails_and_says_which_field() -> None:
    cluster, kubelet = world()
    cluster.job["spec"]["training"]["epochs"] = "three"
    await drive(cluster, kubelet)
    accepted = cluster.status.condition("Accepted")
    assert accepted is not None
    assert (cluster.status.phase, accepted.status, accepted.reason) == ("Failed", "False", "InvalidSpec")
    assert "spec.training.epochs: " in accepted.message
    assert cluster.objects == {}
