"""A published job is measured again and again: the operator dies at every write, and twice nothing is measured twice."""

import itertools
import json

import pytest
from tests.builders import Clock, raw_job
from tests.fakes import FakeCluster, FakeKubelet, Object, drive

from finetune_api import LABEL_ATTEMPT, LABEL_JOB_UID, LABEL_ROLE
from finetune_api.monitoring_status import FreshFigure
from finetune_api.report import Report, termination_message
from finetune_api.status import Evaluation, EvaluationResult

RELEASED = Evaluation(results=(EvaluationResult(metric="task/f1", value=0.8),))
SPEC = {
    "evaluation": {"suites": [{"name": "task", "source": "validation", "metrics": ["f1"]}]},
    "monitoring": {"schedule": "0 3 * * *", "suites": [{"name": "task", "source": "pvc://fresh/today.jsonl"}]},
}


class MeasuringKubelet(FakeKubelet):
    """The trainer also measures: prepares, asks its two workers, and tells a figure that is worse each time."""

    def _train(self, head: Object) -> None:
        attempt = int(head["metadata"]["labels"][LABEL_ATTEMPT])
        job = json.loads(self.cluster.objects["ConfigMap", f"bot-{attempt}"]["data"]["job.json"])
        if "monitoring" not in job["spec"]:
            super()._train(head)
            return
        uid = head["metadata"]["uid"]
        stage = self._stages.setdefault(uid, "Fresh")
        if stage == "Fresh":
            self._stages[uid] = "Evaluate"
            self._told(head, workers_wanted=2)
        elif self._workers(attempt) >= 2:
            self.measured.append(attempt)
            value = 0.9 - 0.2 * len(self.measured)
            fresh = (FreshFigure(metric="task/f1", value=value, low=value - 0.05, high=value + 0.05, n=20),)
            self.end(head, 0, termination_message(self._told(head, outcome="Succeeded", fresh=fresh)), "Completed")

    def _told(self, head: Object, **given) -> Report:
        labels = head["metadata"]["labels"]
        report = Report(job_uid=labels[LABEL_JOB_UID], attempt=int(labels[LABEL_ATTEMPT]), **given)
        if not report.outcome:
            self.cluster.reports[head["metadata"]["uid"]] = report
        return report

    def _report(self, head: Object, **given) -> None:
        if given.get("outcome") == "Succeeded":
            given["evaluation"] = RELEASED
        super()._report(head, **given)

    @property
    def measured(self) -> list[int]:
        """The numbers of the runs that came to their end."""
        return self.__dict__.setdefault("_measured", [])


def world() -> tuple[FakeCluster, MeasuringKubelet]:
    cluster = FakeCluster(Clock(), raw_job(**SPEC))
    return cluster, MeasuringKubelet(cluster)


async def days(cluster: FakeCluster, kubelet: FakeKubelet, count: int) -> None:
    """Until so many runs have ended, and their pods."""
    await drive(cluster, kubelet, until=lambda: _runs(cluster) >= count and not cluster.names("ConfigMap"))


def _runs(cluster: FakeCluster) -> int:
    monitoring = cluster.status.monitoring
    return monitoring.runs + monitoring.failed_runs if monitoring else 0


def degraded(cluster: FakeCluster) -> tuple[str, str]:
    condition = cluster.status.condition("Degraded")
    return condition.status, condition.reason


async def test_run_after_run_the_model_is_found_to_degrade():
    cluster, kubelet = world()
    await days(cluster, kubelet, 1)
    assert cluster.status.monitoring.results[0].value == pytest.approx(0.7)
    assert degraded(cluster) == ("True", "Degraded")  # 0.65 to 0.75, released with 0.8
    await days(cluster, kubelet, 2)
    assert kubelet.measured == [2, 3]
    assert cluster.status.monitoring.results[0].value == pytest.approx(0.5)
    assert [event.reason for event in cluster.events.values() if event.reason in ("Degraded", "QualityHeld")] == ["Degraded"]
    assert cluster.names("Pod") == {"bot-3-head"}
    assert cluster.status.attempt.number == 1
    assert kubelet.trained == [1, 2, 3, 4]


async def test_a_published_job_costs_nothing_between_its_runs():
    cluster, kubelet = world()
    await days(cluster, kubelet, 1)
    before = len(cluster.writes)
    start = cluster.clock.now
    await drive(cluster, kubelet, until=lambda: cluster.status.monitoring.next_run_time is None)
    made = [f"apply {kind}" for kind in ("ConfigMap", "Secret", "Service", "NetworkPolicy", "Pod")]
    assert [" ".join(write.split()[:2]) for write in cluster.writes[before:]] == ["patch status", *made, "delete Pod"]
    assert (cluster.clock.now - start).total_seconds() > 23 * 3600


async def _writes_of_one_run() -> int:
    cluster, kubelet = world()
    await drive(cluster, kubelet, until=lambda: cluster.status.phase == "Complete")
    before = len(cluster.writes)
    await days(cluster, kubelet, 1)
    return len(cluster.writes) - before


async def test_an_operator_that_dies_at_any_write_measures_once():
    """Every write of the first run, from the publication on, is the operator's last one."""
    for write in range(1, await _writes_of_one_run() + 1):
        cluster, kubelet = world()
        await drive(cluster, kubelet, until=lambda cluster=cluster: cluster.status.phase == "Complete")
        cluster.crash_after = len(cluster.writes) + write
        await days(cluster, kubelet, 1)
        assert kubelet.measured == [2], write
        assert (cluster.status.monitoring.runs, cluster.status.monitoring.failed_runs) == (1, 0), write
        assert degraded(cluster) == ("True", "Degraded"), write
        assert len([event for event in cluster.events.values() if event.reason == "Degraded"]) <= 1, write
        assert not [name for kind, name in cluster.objects if kind != "Pod"], write


async def test_a_head_that_is_killed_at_any_moment_costs_that_run_alone():
    for moment in range(6):
        cluster, kubelet = world()
        await drive(cluster, kubelet, until=lambda cluster=cluster: cluster.status.phase == "Complete")
        begun = lambda cluster=cluster: cluster.status.monitoring.run is not None  # noqa: E731
        await drive(cluster, kubelet, until=begun)
        looks = iter(range(moment))
        await drive(cluster, kubelet, until=lambda looks=looks: next(looks, None) is None)
        running = [pod for pod in cluster.pods if pod["status"]["phase"] == "Running" and pod["metadata"]["labels"][LABEL_ROLE] == "head"]
        for head in running:
            kubelet.end(head, 137)
        await days(cluster, kubelet, 2)
        monitoring = cluster.status.monitoring
        assert monitoring.failed_runs == len(running), moment
        assert monitoring.runs + monitoring.failed_runs == 2, moment
        assert cluster.status.phase == "Complete"
        assert cluster.status.attempt.failures == 0


class HangingKubelet(MeasuringKubelet):
    """The first run's head never comes to an end."""

    def _train(self, head: Object) -> None:
        if head["metadata"]["labels"][LABEL_ATTEMPT] != "2":
            super()._train(head)


async def test_an_operator_that_dies_at_any_write_ends_a_run_that_hangs_once():
    """Every write from the publication to the end of the run's pods is the operator's last one; the second run does not suffer."""
    total = None
    for write in itertools.count(0):
        cluster = FakeCluster(Clock(), raw_job(**SPEC, activeDeadlineSeconds=120))
        kubelet = HangingKubelet(cluster)
        await drive(cluster, kubelet, until=lambda cluster=cluster: cluster.status.phase == "Complete")
        before = len(cluster.writes)
        cluster.crash_after = before + write if write else None
        hung = lambda cluster=cluster: _runs(cluster) >= 1  # noqa: E731
        await drive(cluster, kubelet, until=hung)
        failure = cluster.status.monitoring.failure
        assert failure is not None, write
        assert (failure.reason, failure.message) == (
            "DeadlineExceeded",
            "run 2 has not ended within activeDeadlineSeconds (120)",
        )
        assert degraded(cluster) == ("Unknown", "DeadlineExceeded"), write
        await days(cluster, kubelet, 1)
        total = total or len(cluster.writes) - before
        await days(cluster, kubelet, 2)
        assert kubelet.measured == [3], write
        assert (cluster.status.monitoring.runs, cluster.status.monitoring.failed_runs) == (1, 1), write
        assert len([event for event in cluster.events.values() if event.reason == "DeadlineExceeded"]) <= 1, write
        if write == total:
            break


async def test_deleting_the_job_ends_a_run():
    cluster, kubelet = world()
    await days(cluster, kubelet, 1)
    await drive(cluster, kubelet, until=lambda: len(cluster.pods) == 1 and bool(cluster.names("ConfigMap")))
    cluster.job = None
    await drive(cluster, kubelet)
    assert not cluster.objects


async def test_the_time_to_live_counts_from_the_completion():
    cluster = FakeCluster(Clock(), raw_job(**SPEC, ttlSecondsAfterFinished=36 * 3600))
    kubelet = MeasuringKubelet(cluster)
    await drive(cluster, kubelet)
    assert cluster.job is None
    assert kubelet.measured == [2, 3]  # completed on Thursday after midnight: at three on Thursday and on Friday, gone at noon
