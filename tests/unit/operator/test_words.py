"""A status in words, line by line."""

import pytest

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
    MemoryParts,
    Plan,
    SearchBest,
    SearchSummary,
    Status,
    Usage,
)
from finetune_operator.words import status_lines


def lines(**given: object) -> list[str]:
    """What is said of these fields, without the two lines that every status has."""
    return status_lines(Status(phase="Training", **given))[2:]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DataSummary(train=90), []),
        (DataSummary(train=90, rejected=2), ["data: 90 examples to train on; 2 rejected"]),
        (
            DataSummary(train=90, made=40, rejected=2, duplicates=3, leaked=1),
            ["data: 90 examples to train on; 40 made, 2 rejected, 3 duplicates left out, 1 leaked"],
        ),
    ],
    ids=["as it was", "some rejected", "all that may happen"],
)
def test_what_became_of_the_data_is_said_where_something_did(data, said) -> None:
    assert lines(data=data) == said


def test_the_baselines_are_listed_with_the_best() -> None:
    entries = (
        BaselineResult(prompt="zero-shot", metric="task/f1", value=0.25),
        BaselineResult(prompt="few-shot", model="other", metric="task/f1", value=0.5, low=0.375, high=0.625, best=True),
    )
    assert lines(baseline=entries) == [
        "prompt zero-shot: task/f1 0.25",
        "prompt few-shot (other): task/f1 0.5 (0.375 to 0.625), the best",
    ]


def test_the_search_is_told_with_its_best_trial() -> None:
    assert lines(search=SearchSummary(trials=8, completed=2, failed=1)) == ["search: 2 of 8 trials completed, 1 failed, 0 pruned"]
    best = SearchBest(trial=3, value=1.25, parameters={"training.learningRate": 0.001, "method.lora.rank": 8})
    assert lines(search=SearchSummary(trials=8, completed=8, best=best))[1:] == [
        "best trial: 3 with 1.25: training.learningRate 0.001, method.lora.rank 8"
    ]


def test_results_come_with_their_intervals_and_what_they_are_compared_with() -> None:
    result = EvaluationResult(
        metric="task/exactMatch",
        value=0.875,
        baseline=0.5,
        low=0.75,
        high=1.0,
        difference=Difference(value=0.375, low=0.25, high=0.5),
        n=40,
        compared=(ComparedResult(other="other-job", value=0.75, difference=Difference(value=0.125)), ComparedResult(other="older")),
    )
    assert lines(evaluation=Evaluation(results=(result,))) == [
        "task/exactMatch: 0.5 before, 0.875 after (0.75 to 1), difference +0.375 (0.25 to 0.5)",
        "  other-job: 0.75, difference +0.125",
        "  older: not measured",
    ]


def test_gates_and_health_come_with_why() -> None:
    gates = (
        GateResult(metric="task/f1", verdict="Passed", observed=0.875, low=0.8125, high=0.9375, required="at least 0.8"),
        GateResult(metric="retention/loss", verdict="Failed", observed=0.5, required="at most 0.05 more", over="baseline"),
        GateResult(metric="train/gap", verdict="Inconclusive", required="at most 0.5"),
    )
    health = (
        Health(name="forgetting", suite="retention", verdict="Bad", message="the loss rose by 0.5"),
        Health(name="overfitting", verdict="Good"),
    )
    assert lines(evaluation=Evaluation(gates=gates, health=health, report="pvc://models/bot/report.md")) == [
        "gate task/f1: Passed: 0.875 (0.8125 to 0.9375), required at least 0.8",
        "gate retention/loss: Failed: 0.5, required at most 0.05 more than baseline",
        "gate train/gap: Inconclusive: not measured, required at most 0.5",
        "forgetting (retention): Bad: the loss rose by 0.5",
        "overfitting: Good",
        "report: pvc://models/bot/report.md",
    ]


def test_a_failure_is_told_with_where_it_was_its_last_words_and_what_to_change() -> None:
    why = Failure(
        stage="Train",
        reason="GPUOutOfMemory",
        message="CUDA out of memory",
        hint="Lower training.microBatchSize.",
        retryable=True,
        pod="bot-1-head",
        exit_code=1,
        log="\n".join(f"line {number}" for number in range(20)),
    )
    assert lines(failure=why) == [
        "failure: GPUOutOfMemory: CUDA out of memory",
        "where: stage Train, pod bot-1-head, exit code 1; another attempt may help",
        "the last lines of its log:",
        *(f"  | line {number}" for number in range(8, 20)),
        "what to do: Lower training.microBatchSize.",
        "more of it: finetune explain GPUOutOfMemory",
    ]


def test_a_plan_and_what_was_used() -> None:
    plan = Plan(steps=120, memory_per_gpu=MemoryParts(total=12 * 2**30), gpu="l4", fits=True, gpu_hours=1.234)
    assert lines(plan=plan) == ["plan: 120 steps, 12.0 GiB of each GPU, fits into l4, about 1.23 GPU-hours"]
    assert lines(plan=Plan(steps=3)) == ["plan: 3 steps, 0.0 GiB of each GPU"]
    assert lines(usage=Usage(gpu_seconds=5400, trained_tokens=7)) == ["used: 1.50 GPU-hours, 7 tokens trained on"]
