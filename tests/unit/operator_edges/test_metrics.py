from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune_operator.metrics import SERIES_PER_JOB, Metrics

JOB: dict[str, Any] = {
    "metadata": {"namespace": "team", "name": "bot", "uid": "u-1", "labels": {"kueue.x-k8s.io/queue-name": "gpu-a", "other": "x"}},
    "spec": {"model": {"source": "hf://org/model"}, "method": {"lora": {"rank": 8}}, "objective": {"sft": {}}},
    "status": {
        "observedGeneration": 1,
        "phase": "Training",
        "message": "free text that must not become a label",
        "startTime": "2026-01-01T00:00:00Z",
        "attempt": {"number": 3, "failures": 1, "preemptions": 1, "lostSteps": 20},
        "workersWanted": 4,
        "workersReady": 3,
        "progress": {"percent": 33, "step": 420, "totalSteps": 1260, "epoch": 1.0, "tokensPerSecond": 1000.0, "etaSeconds": 2400},
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
            }
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


def test_state_of_a_job_is_told_from_its_status(metrics: Metrics) -> None:
    metrics.jobs.see(JOB, gone=False)
    found = samples(metrics)
    info = {"uid": "u-1", "method": "lora", "objective": "sft", "base_model": "hf://org/model", "queue": "gpu-a"}
    assert of_job(found, "finetune_job_info", **info) == 1
    assert of_job(found, "finetune_job_status_phase", phase="Training") == 1
    assert of_job(found, "finetune_job_status_phase", phase="Complete") == 0
    assert of_job(found, "finetune_job_failed", reason="OOMKilled") == 1
    assert of_job(found, "finetune_job_start_timestamp_seconds") == 1767225600  # date -d 2026-01-01T00:00:00Z +%s
    assert of_job(found, "finetune_job_attempt") == 3
    assert of_job(found, "finetune_job_failures_total") == 1
    assert of_job(found, "finetune_job_preemptions_total") == 1
    assert of_job(found, "finetune_job_workers_wanted") == 4
    assert of_job(found, "finetune_job_workers_ready") == 3
    assert of_job(found, "finetune_job_gpu_seconds_total") == 5400
    assert of_job(found, "finetune_training_tokens_total") == 6100000
    assert of_job(found, "finetune_training_step") == 420
    assert of_job(found, "finetune_training_steps_planned") == 1260
    assert of_job(found, "finetune_training_progress_ratio") == 0.33
    assert of_job(found, "finetune_training_loss") == 1.18
    assert of_job(found, "finetune_training_eval_loss") == 1.31
    assert of_job(found, "finetune_training_checkpoint_step") == 400
    assert of_job(found, "finetune_evaluation_test_loss", model="base") == 2.0
    assert of_job(found, "finetune_evaluation_test_loss", model="tuned") == 1.0


EVALUATED = {
    "phase": "Evaluating",
    "search": {"trials": 8, "completed": 5, "failed": 1, "pruned": 2},
    "evaluation": {
        "results": [
            {"metric": "task/f1", "value": 0.75, "baseline": 0.5},
            {"metric": "judged/judgeWinRate", "value": 0.625},
            {"metric": "a tenant's own words", "value": 1.0},
        ],
        "gates": [{"metric": "task/f1", "verdict": verdict, "required": "x"} for verdict in ("Passed", "Failed", "Passed")],
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


def test_job_with_all_that_it_may_measure_has_few_series(metrics: Metrics) -> None:
    before = sum(len(each) for each in samples(metrics).values())
    results = [{"metric": f"suite-{index}/f1", "value": 0.5, "baseline": 0.25} for index in range(260)]
    status = {**JOB["status"], **EVALUATED, "evaluation": {**EVALUATED["evaluation"], "results": results}}
    metrics.jobs.see({**JOB, "status": status}, gone=False)
    assert sum(len(each) for each in samples(metrics).values()) - before <= SERIES_PER_JOB
    assert len(samples(metrics)["finetune_job_evaluation"]) == 48


def test_job_has_few_series_and_no_free_text(metrics: Metrics) -> None:
    before = sum(len(each) for each in samples(metrics).values())
    metrics.jobs.see(JOB, gone=False)
    found = samples(metrics)
    assert 20 < sum(len(each) for each in found.values()) - before <= SERIES_PER_JOB
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
    assert "finetune_training_loss" not in found
    assert of_job(found, "finetune_job_status_phase", phase="Pending") == 1


def test_job_without_a_status_is_told_of(metrics: Metrics) -> None:
    metrics.jobs.see({"metadata": {"namespace": "team", "name": "bot", "uid": "u"}, "spec": {}}, gone=False)
    assert of_job(samples(metrics), "finetune_job_status_phase", phase="Pending") == 0


def test_status_that_cannot_be_read_costs_only_its_own_series(metrics: Metrics) -> None:
    odd = {**JOB, "metadata": {**JOB["metadata"], "uid": "u-0", "name": "odd"}, "status": {"phase": "Dreaming"}}
    metrics.jobs.see(odd, gone=False)
    metrics.jobs.see(JOB, gone=False)
    told = metrics.render()
    assert b'name="odd"' not in told
    assert b'name="bot"' in told


def test_replica_that_stands_by_tells_of_no_job() -> None:
    metrics = Metrics("1.2.3", depth=lambda: 0, leading=lambda: False)
    metrics.jobs.see(JOB, gone=False)
    found = samples(metrics)
    assert "finetune_job_info" not in found
    assert found["finetune_operator_leader"][()] == 0


def test_operator_tells_of_itself(metrics: Metrics) -> None:
    metrics.api_request("list", 200)
    metrics.api_request("list", 200)
    metrics.api_request("patch", 0)
    with metrics.reconcile():
        pass
    with pytest.raises(ZeroDivisionError), metrics.reconcile():
        1 / 0  # noqa: B018
    found = samples(metrics)
    assert found["finetune_operator_api_requests_total"] == {(("code", "200"), ("verb", "list")): 2, (("code", "0"), ("verb", "patch")): 1}
    assert found["finetune_operator_reconcile_total"] == {(("result", "done"),): 1, (("result", "error"),): 1}
    assert found["finetune_operator_reconcile_duration_seconds_count"][()] == 2
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
