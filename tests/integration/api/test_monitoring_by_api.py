"""A published job is measured again on a real API server: the status is taken, the objects come and go, and the operator may change."""

import asyncio
from typing import Any

import pytest
from tests.integration.api import stages
from tests.integration.api.players import success
from tests.integration.api.stages import Stage, is_true

from finetune_api.monitoring_status import FreshFigure
from finetune_api.report import Report
from finetune_api.status import Evaluation, EvaluationResult, Status

pytestmark = [pytest.mark.api, pytest.mark.asyncio(loop_scope="session")]

SPEC: dict[str, Any] = {
    "evaluation": {"suites": [{"name": "task", "source": "validation", "metrics": ["loss", "f1"]}]},
    "monitoring": {
        "schedule": "* * * * *",
        "suites": [{"name": "task", "source": "pvc://fresh/today.jsonl"}],
        "degradedIf": [{"metric": "task/f1", "worseBy": 0.05}],
    },
}
RELEASED = Evaluation(results=(EvaluationResult(metric="task/loss", value=1.0), EvaluationResult(metric="task/f1", value=0.8)))
FRESH = (
    FreshFigure(metric="task/loss", value=1.25, low=1.0, high=1.5, n=9),
    FreshFigure(metric="task/f1", value=0.5, low=0.4, high=0.6, n=9),
)


def released_then_measured(uid: str, attempt: int) -> list[Report]:
    """The first set of pods trains and publishes, every other one measures."""
    if attempt == 1:
        *steps, end = success(uid, attempt)
        return [*steps, end.model_copy(update={"evaluation": RELEASED})]
    said = {"job_uid": uid, "attempt": attempt}
    return [
        Report(**said, revision=1, message="reading fresh data"),
        Report(**said, revision=2, workers_wanted=2, message="measuring the published model"),
        Report(**said, revision=3, outcome="Succeeded", fresh=FRESH),
    ]


def monitoring_of(job: dict[str, Any]) -> dict[str, Any]:
    return job.get("status", {}).get("monitoring") or {}


async def test_a_published_model_is_measured_again_by_whoever_is_the_operator(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LIFE_SECONDS", 150)  # the schedule's next minute may be a minute away
    async with stage.player(released_then_measured).playing() as player:
        async with stage.operator().running() as operator:
            await stage.apply(**SPEC)
            await stage.wait_for_end(operator)
            await stage.wait_for_job(lambda job: "run" in monitoring_of(job), "measured again", operator)
        async with stage.operator().running() as another:
            job = await stage.wait_for_job(lambda job: is_true(job, "Degraded"), "found to be degraded", another)
            assert is_true(job, "Complete")
            assert is_true(job, "Ready")
            status = Status.model_validate(job["status"])
            assert status.monitoring is not None
            assert (status.monitoring.runs, status.monitoring.failed_runs, status.attempt.number) == (1, 0, 1)
            assert [(each.metric, each.difference, each.verdict) for each in status.monitoring.results] == [
                ("task/loss", 0.25, None),
                ("task/f1", pytest.approx(-0.3), "Degraded"),
            ]
            created = [name for name, _ in player.created]
            assert created[:6] == [f"tune-{run}-{pod}" for run in (1, 2) for pod in ("head", "worker-0", "worker-1")]
            async with asyncio.timeout(30):  # the Event follows on the status
                while "Degraded" not in await stage.told():
                    await asyncio.sleep(0.1)
            # It can be taken away at any time, and everything of it goes.
            await stage.kube.patch("FineTuneJob", stage.namespace, "tune", {"spec": {"monitoring": None}})
            job = await stage.wait_for_job(lambda job: not monitoring_of(job), "left alone", another)
            assert not [each for each in job["status"]["conditions"] if each["type"] == "Degraded"]
    assert Status.model_validate((await stage.job())["status"]).phase == "Complete"
