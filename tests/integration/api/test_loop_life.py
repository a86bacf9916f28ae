"""A job with baseline, search and gates, from `kubectl apply` to its end: held back, or good enough without any training."""

from typing import Any

import pytest
from tests.integration.api.players import NOW
from tests.integration.api.stages import Stage, is_true

from finetune_api.report import Report
from finetune_api.status import (
    BaselineResult,
    ComparedResult,
    DataSummary,
    Difference,
    Evaluation,
    EvaluationResult,
    Failure,
    GateResult,
    Health,
    SearchBest,
    SearchSummary,
    StageName,
    Status,
    TokenStatistics,
)
from finetune_api.status import Stage as StageOfJob

pytestmark = [pytest.mark.api, pytest.mark.asyncio(loop_scope="session")]

LOOP: dict[str, Any] = {
    "baseline": {
        "prompts": [{"name": "zero-shot"}, {"name": "few-shot", "examples": 4}],
        "sufficientIf": {"metric": "task/exactMatch", "atLeast": 0.95},
    },
    "search": {"parameters": {"method.lora.rank": {"choice": [8, 16]}}, "trials": 2},
    "evaluation": {
        "suites": [{"name": "task", "source": "validation", "metrics": ["exactMatch"]}],
        "compareWith": ["baseline", "other"],
        "gates": [{"metric": "task/exactMatch", "atLeast": 0.8}],
    },
}
NAMES: tuple[StageName, ...] = ("Prepare", "Baseline", "Search", "Train", "Evaluate", "Publish")
BASELINE = (BaselineResult(prompt="few-shot", metric="task/exactMatch", value=0.5, low=0.4, high=0.6, best=True),)
SEARCH = SearchSummary(trials=2, completed=2, best=SearchBest(trial=2, value=1.5, parameters={"method.lora.rank": 16}))
RESULT = EvaluationResult(
    metric="task/exactMatch",
    value=0.75,
    baseline=0.5,
    low=0.7,
    high=0.79,
    difference=Difference(value=0.25, low=0.125, high=0.375),
    n=40,
    compared=(ComparedResult(other="other", value=0.7, difference=Difference(value=0.05)),),
)
JUDGED = Evaluation(
    results=(RESULT,),
    gates=(GateResult(metric="task/exactMatch", verdict="Failed", observed=0.75, low=0.7, high=0.79, required="at least 0.8"),),
    health=(Health(name="overfitting", verdict="Good"),),
    candidate=40,
    report="pvc://models/tuned/.finetune/report.md",
)
DATA = DataSummary(train=90, made=40, made_samples=("a prompt",), tokens_per_example=TokenStatistics(min=4, median=20, p95=50, max=60))


def report(uid: str, attempt: int, revision: int, stage: StageName, **more: Any) -> Report:
    index = NAMES.index(stage)
    done = [StageOfJob(name=name, state="Succeeded", start_time=NOW, end_time=NOW) for name in NAMES[:index]]
    rest = [StageOfJob(name=name, state="Pending") for name in NAMES[index + 1 :]]
    stages = (*done, StageOfJob(name=stage, state="Running", start_time=NOW), *rest)
    return Report(job_uid=uid, attempt=attempt, revision=revision, message=f"played: {stage}", stages=stages, data=DATA, **more)


def held_back(uid: str, attempt: int) -> list[Report]:
    """All stages up to a gate that is not passed."""
    why = Failure(stage="Evaluate", reason="GatesNotPassed", message="task/exactMatch is 0.75, and must be at least 0.8")
    said: dict[str, Any] = {"baseline": BASELINE, "search": SEARCH}
    return [
        report(uid, attempt, 1, "Prepare"),
        report(uid, attempt, 2, "Baseline", workers_wanted=2),
        report(uid, attempt, 3, "Search", workers_wanted=2, baseline=BASELINE),
        report(uid, attempt, 4, "Train", workers_wanted=2, **said),
        report(uid, attempt, 5, "Evaluate", workers_wanted=2, **said),
        report(uid, attempt, 6, "Evaluate", evaluation=JUDGED, outcome="Failed", failure=why, **said),
    ]


def good_enough(uid: str, attempt: int) -> list[Report]:
    """A prompt that is good enough."""
    return [
        report(uid, attempt, 1, "Prepare"),
        report(uid, attempt, 2, "Baseline", workers_wanted=2),
        report(uid, attempt, 3, "Baseline", baseline=BASELINE, sufficient=True, outcome="Succeeded"),
    ]


async def test_a_model_that_does_not_pass_its_gates_ends_the_job_with_its_figures(stage: Stage) -> None:
    async with stage.player(held_back).playing() as player, stage.operator().running() as operator:
        await stage.apply(**LOOP)
        job = await stage.wait_for_end(operator)
        await stage.wait_for_children("Pod/tune-1-head")

    status = Status.model_validate(job["status"])
    assert is_true(job, "Failed")
    assert status.failure is not None
    assert status.failure.reason == "GatesNotPassed"
    conditions = {condition["type"]: (condition["status"], condition["reason"]) for condition in job["status"]["conditions"]}
    assert conditions["GatesPassed"] == ("False", "GatesNotPassed")
    assert conditions["Evaluated"] == ("True", "Succeeded")
    assert conditions["Published"] == ("False", "GatesNotPassed")
    assert status.attempt.number == 1
    assert (status.baseline, status.search, status.evaluation, status.data) == (BASELINE, SEARCH, JUDGED, DATA)
    assert [name for name, _ in player.created] == ["tune-1-head", "tune-1-worker-0", "tune-1-worker-1"]
    # What stages there were, and when, stands in the status; Events tell of the training alone.
    gone_through = [stage.name for stage in status.stages if stage.state != "Pending"]
    assert gone_through == ["Prepare", "Baseline", "Search", "Train", "Evaluate"]
    assert set(await stage.told()) == {"Accepted", "GatesNotPassed"}


async def test_a_prompt_that_is_good_enough_completes_the_job(stage: Stage) -> None:
    async with stage.player(good_enough).playing(), stage.operator().running() as operator:
        await stage.apply(**LOOP)
        job = await stage.wait_for_end(operator)
        await stage.wait_for_children("Pod/tune-1-head")

    conditions = {condition["type"]: (condition["status"], condition["reason"]) for condition in job["status"]["conditions"]}
    assert job["status"]["phase"] == "Complete"
    assert conditions["Complete"] == ("True", "BaselineSufficient")
    assert conditions["Published"] == ("False", "BaselineSufficient")
    assert conditions["GatesPassed"] == ("Unknown", "Pending")
    assert "artifacts" not in job["status"] or job["status"]["artifacts"] == []
    assert "BaselineSufficient" in await stage.told()
