import asyncio
import time
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.promtool import check_metrics

from finetune_api.status import ConditionType
from finetune_operator.job_series import CONDITIONS_SHOWN, SERIES_PER_JOB, JobCollector
from finetune_operator.metrics import Metrics
from finetune_operator.port import ApiError
from finetune_trainer.training_series import SERIES as SERIES_OF_A_HEAD

JOB: dict[str, Any] = {
    "metadata": {"namespace": "team", "name": "bot", "uid": "u-1", "labels": {"kueue.x-k8s.io/queue-name": "gpu-a", "other": "x"}},
    "spec": {"model": {"source": "hf://org/model"}, "method": {"lora": {"rank": 8}}, "objective": {"sft": {}}},
    "status": {
        "observedGeneration": 1,
        "phase": "Training",
        "message": "free text that must not become a label",
        "startTime": "2026-01-01T00:00:00Z",
        "attempt": {"number": 3, "failures": 1, "preemptions": 1, "lostSteps": 20, "startTime": "2026-01-01T00:10:00Z"},
        "stages": [
            {"name": "Prepare", "state": "Succeeded", "startTime": "2026-01-01T00:10:40Z", "endTime": "2026-01-01T00:12:00Z"},
            {"name": "Train", "state": "Running", "startTime": "2026-01-01T00:12:00Z"},
        ],
        "workersWanted": 4,
        "workersReady": 3,
        "progress": {
            "percent": 33,
            "step": 420,
            "totalSteps": 1260,
            "epoch": 1.0,
            "tokensPerSecond": 1000.0,
            "etaSeconds": 2400,
            "lastUpdateTime": "2026-01-01T00:20:00Z",
        },
        "metrics": [{"name": "train/loss", "value": 1.18, "step": 420}, {"name": "validation/loss", "value": 1.31}],
        "checkpoints": {"latest": {"step": 400, "uri": "pvc://a/b"}},
        "evaluation": {"results": [{"metric": "test/loss", "value": 1.0, "baseline": 2.0}]},
        "usage": {"gpuSeconds": 5400, "trainedTokens": 6100000},
        "conditions": [
            {
                "type": "Failed",
                "status": "True",
                "observedGeneration": 1,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
                "reason": "OOMKilled",
            },
            {
                "type": "Ready",
                "status": "False",
                "observedGeneration": 1,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
                "reason": "OOMKilled",
            },
        ],
    },
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3", depth=lambda: 5, leading=lambda: True)


def samples(metrics: Metrics) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample as name -> labels -> value, as Prometheus's own parser reads them."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def of_job(found: dict[str, dict[tuple[tuple[str, str], ...], float]], name: str, **labels: str) -> float:
    return found[name][tuple(sorted({"namespace": "team", "name": "bot", **labels}.items()))]


def test_methods_and_objectives_are_named_as_in_the_spec(metrics: Metrics) -> None:
    spec = {**JOB["spec"], "method": {"promptTuning": {}}, "objective": {"distillation": {}}}
    metrics.jobs.see({**JOB, "spec": spec}, gone=False)
    info = {"uid": "u-1", "method": "promptTuning", "objective": "distillation", "base_model": "hf://org/model", "queue": "gpu-a"}
    assert of_job(samples(metrics), "finetune_job_info", **info) == 1


def test_the_queue_is_the_one_that_the_job_is_in(metrics: Metrics) -> None:
    """A label that its profile does not allow leads into none, and a job without one is in the profile's."""
    profile = {"name": "small", "queue": "gpu-b", "allow": {"queues": ["gpu-c"]}}
    for labels in {}, JOB["metadata"]["labels"]:
        job = {**JOB, "metadata": {**JOB["metadata"], "labels": labels}, "status": {**JOB["status"], "resolved": {"profile": profile}}}
        metrics.jobs.see(job, gone=False)
        info = {"uid": "u-1", "method": "lora", "objective": "sft", "base_model": "hf://org/model", "queue": "gpu-b"}
        assert of_job(samples(metrics), "finetune_job_info", **info) == 1


def test_state_of_a_job_is_told_from_its_status(metrics: Metrics) -> None:
    metrics.jobs.see(JOB, gone=False)
    found = samples(metrics)
    info = {"uid": "u-1", "method": "lora", "objective": "sft", "base_model": "hf://org/model", "queue": "gpu-a"}
    assert of_job(found, "finetune_job_info", **info) == 1
    assert of_job(found, "finetune_job_status_phase", phase="Training") == 1
    assert len(found["finetune_job_status_phase"]) == 1
    assert of_job(found, "finetune_job_status_reason", reason="OOMKilled") == 1
    assert of_job(found, "finetune_job_condition", condition="Failed", status="True") == 1
    assert of_job(found, "finetune_job_condition", condition="Ready", status="False") == 1
    assert found["finetune_jobs"] == {(("namespace", "team"), ("phase", "Training")): 1}
    assert of_job(found, "finetune_job_restarts_total") == 2
    assert of_job(found, "finetune_job_queue_wait_seconds") == 40  # 00:10:00 to 00:10:40
    assert of_job(found, "finetune_job_startup_duration_seconds") == 120  # 00:10:00 to 00:12:00
    assert of_job(found, "finetune_job_progress_timestamp_seconds") == 1767226800  # date -d 2026-01-01T00:20:00Z +%s
    assert of_job(found, "finetune_job_failures_total") == 1
    assert of_job(found, "finetune_job_preemptions_total") == 1
    assert of_job(found, "finetune_job_workers_wanted") == 4
    assert of_job(found, "finetune_job_workers_ready") == 3
    assert of_job(found, "finetune_job_gpu_seconds_total") == 5400
    assert of_job(found, "finetune_job_trained_tokens_total") == 6100000
    assert of_job(found, "finetune_job_progress_ratio") == 0.33
    assert of_job(found, "finetune_job_eta_seconds") == 2400
    assert of_job(found, "finetune_job_checkpoint_step") == 400
    assert of_job(found, "finetune_job_evaluation", metric="test/loss", model="base") == 2.0
    assert of_job(found, "finetune_job_evaluation", metric="test/loss", model="tuned") == 1.0


def collected(status: dict[str, Any], now: float) -> dict[str, float]:
    """The samples of one job without labels of their own, at a moment (Unix time)."""
    jobs = JobCollector(exposed=lambda: True, clock=lambda: now)
    jobs.see({**JOB, "status": status}, gone=False)
    return {
        sample.name: sample.value for metric in jobs.collect() for sample in metric.samples if set(sample.labels) == {"namespace", "name"}
    }


def test_times_of_a_job_go_on_until_they_end() -> None:
    noon = 1767268800  # date -d 2026-01-01T12:00:00Z +%s
    waiting = {"startTime": "2026-01-01T11:00:00Z", "attempt": {"number": 1, "startTime": "2026-01-01T11:59:00Z"}}
    assert collected(waiting, noon)["finetune_job_queue_wait_seconds"] == 60
    assert collected(waiting, noon)["finetune_job_duration_seconds"] == 3600
    ended = {**waiting, "completionTime": "2026-01-01T11:30:00Z"}
    assert collected(ended, noon)["finetune_job_duration_seconds"] == 1800
    # The stages of the attempt before say nothing of this one.
    again = {**waiting, "stages": [{"name": "Train", "state": "Running", "startTime": "2026-01-01T11:10:00Z"}]}
    assert "finetune_job_startup_duration_seconds" not in collected(again, noon)
    assert collected(again, noon)["finetune_job_queue_wait_seconds"] == 60
    assert "finetune_job_duration_seconds" not in collected({}, noon)


def ending(kind: str, reason: str) -> dict[str, Any]:
    condition = {"type": kind, "status": "True", "observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z", "reason": reason}
    return {**JOB, "status": {"phase": kind, "conditions": [condition]}}


def test_ends_of_jobs_are_counted_once(metrics: Metrics) -> None:
    running = {**JOB, "status": {"phase": "Training"}}
    for job in running, ending("Complete", "Succeeded"), ending("Complete", "Succeeded"):
        metrics.jobs.see(job, gone=False)
    metrics.jobs.see(ending("Complete", "Succeeded"), gone=True)
    other = {**running, "metadata": {**JOB["metadata"], "uid": "u-2"}}
    metrics.jobs.see(other, gone=False)
    metrics.jobs.see({**other, "status": ending("Failed", "OOMKilled")["status"]}, gone=False)
    odd = {**running, "metadata": {**JOB["metadata"], "uid": "u-3"}}
    metrics.jobs.see(odd, gone=False)
    metrics.jobs.see({**odd, "status": ending("Failed", "ByTheTenant")["status"]}, gone=False)
    # One that had ended before this operator came was counted by another.
    metrics.jobs.see({**ending("Failed", "OOMKilled"), "metadata": {**JOB["metadata"], "uid": "u-4"}}, gone=False)
    found = samples(metrics)
    assert found["finetune_job_completed_total"] == {(("namespace", "team"),): 1}
    assert found["finetune_job_failed_total"] == {
        (("namespace", "team"), ("reason", "OOMKilled")): 1,
        (("namespace", "team"), ("reason", "Other")): 1,
    }


EVALUATED = {
    "phase": "Evaluating",
    "search": {"trials": 8, "completed": 5, "failed": 1, "pruned": 2},
    "evaluation": {
        "results": [
            {"metric": "task/f1", "value": 0.75, "baseline": 0.5},
            {"metric": "judged/judgeWinRate", "value": 0.625},
            {"metric": "a tenant's own words", "value": 1.0},
        ],
        "gates": [{"metric": "judged/judgeWinRate", "verdict": verdict, "required": "x"} for verdict in ("Passed", "Failed", "Passed")],
    },
}


def test_evaluation_gates_and_search_are_told(metrics: Metrics) -> None:
    metrics.jobs.see({**JOB, "status": EVALUATED}, gone=False)
    found = samples(metrics)
    assert of_job(found, "finetune_job_evaluation", metric="task/f1", model="tuned") == 0.75
    assert of_job(found, "finetune_job_evaluation", metric="task/f1", model="base") == 0.5
    assert of_job(found, "finetune_job_evaluation", metric="judged/judgeWinRate", model="tuned") == 0.625
    assert len(found["finetune_job_evaluation"]) == 3
    assert [of_job(found, "finetune_job_gates", verdict=verdict) for verdict in ("Passed", "Failed", "Inconclusive")] == [2, 1, 0]
    ended = [of_job(found, "finetune_job_search_trials", state=state) for state in ("completed", "failed", "pruned")]
    assert ended == [5, 1, 2]


MONITORED = {
    "monitoring": {
        "runs": 5,
        "failedRuns": 1,
        "lastRunTime": "2026-01-02T03:05:00Z",
        "nextRunTime": "2026-01-03T03:00:00Z",
        "results": [
            {"metric": "task/loss", "value": 1.5, "released": 1.5, "difference": 0.0, "verdict": "Held"},
            {"metric": "task/bleu", "value": 20.0, "released": 30.0, "difference": -10.0},
            {"metric": "a tenant's words", "difference": 1.0, "verdict": "Inconclusive"},
            {"metric": "other/f1", "value": 0.5},
            {"metric": "task/f1", "value": 0.5, "released": 0.75, "difference": -0.25, "verdict": "Degraded"},
        ],
    }
}


def test_drift_and_measuring_runs_are_told(metrics: Metrics) -> None:
    metrics.jobs.see({**JOB, "status": {"phase": "Complete", **MONITORED}}, gone=False)
    found = samples(metrics)
    assert {dict(labels)["metric"]: value for labels, value in found["finetune_job_drift"].items()} == {"task/f1": -0.25, "task/loss": 0.0}
    assert [of_job(found, "finetune_job_monitoring_runs_total", result=result) for result in ("measured", "failed")] == [5, 1]
    # 2 January 2026 begins 1767312000 seconds after 1970
    assert of_job(found, "finetune_job_monitoring_timestamp_seconds") == 1767312000 + 3 * 3600 + 300
    assert of_job(found, "finetune_job_monitoring_next_timestamp_seconds") == 1767312000 + 27 * 3600


def test_a_first_run_that_is_to_come_has_a_time_and_the_last_has_none(metrics: Metrics) -> None:
    first = {"phase": "Complete", "monitoring": {"nextRunTime": "2026-01-02T00:00:00Z"}}
    metrics.jobs.see({**JOB, "status": first}, gone=False)
    found = samples(metrics)
    assert of_job(found, "finetune_job_monitoring_next_timestamp_seconds") == 1767312000
    assert "finetune_job_monitoring_timestamp_seconds" not in found


def test_job_with_all_that_it_may_measure_has_few_series(metrics: Metrics) -> None:
    before = sum(len(each) for each in samples(metrics).values())
    results = [{"metric": f"suite-{index}/f1", "value": 0.5, "baseline": 0.25} for index in range(260)]
    gates = [{"metric": f"suite-{index}/f1", "verdict": "Passed", "required": "x"} for index in (200, 250)]
    conditions = [{**ending(kind, "Pending")["status"]["conditions"][0], "status": "False"} for kind in get_args(ConditionType)]
    evaluation = {"results": results, "gates": gates}
    status = {**JOB["status"], **EVALUATED, **MONITORED, "conditions": conditions, "evaluation": evaluation}
    metrics.jobs.see({**JOB, "status": status}, gone=False)
    found = samples(metrics)
    of_the_namespace = 1  # finetune_jobs
    told = sum(len(each) for each in found.values()) - before - of_the_namespace
    assert set(CONDITIONS_SHOWN) <= set(get_args(ConditionType))
    assert len(found["finetune_job_condition"]) == len(CONDITIONS_SHOWN)
    assert {dict(labels)["metric"] for labels in found["finetune_job_evaluation"]} == {"suite-0/f1", "suite-200/f1", "suite-250/f1"}
    assert told <= SERIES_PER_JOB
    assert SERIES_PER_JOB + SERIES_OF_A_HEAD <= 60


def test_job_has_few_series_and_no_free_text(metrics: Metrics) -> None:
    before = sum(len(each) for each in samples(metrics).values())
    metrics.jobs.see(JOB, gone=False)
    found = samples(metrics)
    assert 20 < sum(len(each) for each in found.values()) - before <= SERIES_PER_JOB + 1  # finetune_jobs is the namespace's
    assert "free text" not in metrics.render().decode()


def test_job_that_is_gone_leaves_no_series(metrics: Metrics) -> None:
    empty = metrics.render().count(b'name="bot"')
    metrics.jobs.see(JOB, gone=False)
    metrics.jobs.see(JOB, gone=True)
    assert empty == metrics.render().count(b'name="bot"') == 0


def test_job_that_was_not_found_at_a_resync_leaves_no_series(metrics: Metrics) -> None:
    other = {**JOB, "metadata": {**JOB["metadata"], "uid": "u-2", "name": "other"}}
    metrics.jobs.see(JOB, gone=False)
    metrics.jobs.see(other, gone=False)
    metrics.jobs.keep({"u-2"})
    told = metrics.render()
    assert b'name="bot"' not in told
    assert b'name="other"' in told


def test_measure_that_a_status_no_longer_has_is_gone(metrics: Metrics) -> None:
    metrics.jobs.see(JOB, gone=False)
    metrics.jobs.see({**JOB, "status": {"phase": "Pending"}}, gone=False)
    found = samples(metrics)
    assert "finetune_job_progress_ratio" not in found
    assert of_job(found, "finetune_job_status_phase", phase="Pending") == 1


def test_job_without_a_status_is_told_of(metrics: Metrics) -> None:
    metrics.jobs.see({"metadata": {"namespace": "team", "name": "bot", "uid": "u"}, "spec": {}}, gone=False)
    assert of_job(samples(metrics), "finetune_job_status_phase", phase="Pending") == 1


def test_status_that_cannot_be_read_costs_only_its_own_series(metrics: Metrics) -> None:
    odd = {**JOB, "metadata": {**JOB["metadata"], "uid": "u-0", "name": "odd"}, "status": {"phase": "Dreaming"}}
    metrics.jobs.see(odd, gone=False)
    metrics.jobs.see(JOB, gone=False)
    told = metrics.render()
    assert b'name="odd"' not in told
    assert b'name="bot"' in told


def test_metrics_are_there_before_anybody_knows_who_leads() -> None:
    """The operator makes its metrics before its election."""

    def nobody_knows() -> bool:
        raise AttributeError("election")

    Metrics("1.2.3", depth=lambda: 0, leading=nobody_knows)


def test_replica_that_stands_by_tells_of_no_job() -> None:
    metrics = Metrics("1.2.3", depth=lambda: 0, leading=lambda: False)
    metrics.jobs.see(JOB, gone=False)
    found = samples(metrics)
    assert "finetune_job_info" not in found
    assert "finetune_jobs" not in found
    assert found["finetune_operator_leader"][()] == 0


def test_operator_tells_of_itself(metrics: Metrics) -> None:
    metrics.api_request("list", 200, 0.02)
    metrics.api_request("list", 200, 0.3)
    metrics.api_request("patch", 0, 15.0)
    metrics.watched("pods")
    with metrics.reconcile():
        pass
    with pytest.raises(ZeroDivisionError), metrics.reconcile():
        1 / 0  # noqa: B018
    for status in 0, 503:
        with pytest.raises(ApiError), metrics.reconcile():
            raise ApiError(status, "free words", "of the server")
    found = samples(metrics)
    assert found["finetune_operator_api_requests_total"] == {(("code", "200"), ("verb", "list")): 2, (("code", "0"), ("verb", "patch")): 1}
    assert found["finetune_operator_reconcile_total"] == {(("result", "done"),): 1, (("result", "error"),): 3}
    assert found["finetune_operator_reconcile_errors_total"] == {(("reason", name),): 1 for name in ("Defect", "Http503", "NoAnswer")}
    assert found["finetune_operator_reconcile_duration_seconds_count"][()] == 4
    assert found["finetune_operator_api_request_duration_seconds_sum"] == {(("verb", "list"),): 0.32, (("verb", "patch"),): 15}
    assert found["finetune_operator_watch_last_event_timestamp_seconds"][(("resource", "pods"),)] == pytest.approx(time.time(), abs=60)
    assert found["finetune_operator_event_loop_lag_seconds"][()] == 0
    assert found["finetune_operator_workqueue_depth"][()] == 5
    assert found["finetune_operator_leader"][()] == 1
    assert [dict(labels)["version"] for labels in found["finetune_operator_build_info"]] == ["1.2.3"]


def test_metrics_have_help_and_base_units(metrics: Metrics) -> None:
    metrics.jobs.see(JOB, gone=False)
    families = [f for f in text_string_to_metric_families(metrics.render().decode()) if f.name.startswith("finetune_")]
    assert families
    for family in families:
        assert family.documentation.endswith("."), family.name
        assert not family.name.endswith(("_ms", "_milliseconds", "_percent", "_minutes")), family.name


async def test_event_loop_that_is_held_up_is_told(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.metrics.LAG_TICK_SECONDS", 0.01)
    follower = asyncio.create_task(metrics.follow_lag())
    await asyncio.sleep(0.05)
    time.sleep(0.3)  # noqa: ASYNC251 - this is what is to be seen
    await asyncio.sleep(0.05)
    follower.cancel()
    assert 0.2 < samples(metrics)["finetune_operator_event_loop_lag_seconds"][()] < 30


def test_promtool_has_nothing_to_object_to(metrics: Metrics) -> None:
    metrics.api_request("list", 200, 0.02)
    metrics.watched("pods")
    metrics.jobs.see({**JOB, "status": {**JOB["status"], **EVALUATED}}, gone=False)
    assert check_metrics(metrics.render()) == ""
