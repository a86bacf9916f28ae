"""The closed loop as the operator sees it: stages before the training, gates, a baseline that is good enough, details that stay."""

import pytest
from tests.builders import at, make_job, make_report, stages
from tests.unit.operator.looks import BEGUN, HEAD, TRAINING, WORKERS, condition, ended, step

from finetune_api.report import parse_report, termination_message
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
    Stage,
    StageName,
)
from finetune_operator.transitions import events_between

SUITES = [{"name": "task", "source": "validation", "metrics": ["exactMatch"]}]
GATED = {
    "evaluation": {
        "suites": SUITES,
        "gates": [{"metric": "task/exactMatch", "atLeast": 0.8}, {"metric": "validation/loss", "maxIncrease": 0, "over": "baseline"}],
    }
}
PROMPTS = {"prompts": [{"name": "few-shot", "examples": 4}]}
ASKED = {"evaluation": {"suites": SUITES}, "baseline": {**PROMPTS, "sufficientIf": {"metric": "task/exactMatch", "atLeast": 0.9}}}


def judged(*verdicts: str) -> Evaluation:
    """A model whose gates have these verdicts."""
    metrics = ("task/exactMatch", "validation/loss")
    gates = [
        GateResult(metric=metric, verdict=verdict, observed=0.75, low=0.7, high=0.8125, required="at least 0.8")
        for metric, verdict in zip(metrics, verdicts, strict=True)
    ]
    results = [EvaluationResult(metric="task/exactMatch", value=0.75, baseline=0.5)]
    return Evaluation(results=tuple(results), gates=tuple(gates))


@pytest.mark.parametrize(
    ("stage", "phase", "reason"), [("Baseline", "Baseline", "MeasuringBaseline"), ("Search", "Searching", "Searching")]
)
def test_the_stages_before_the_training_have_phases_of_their_own(stage: StageName, phase: str, reason: str) -> None:
    stages = (Stage(name="Prepare", state="Succeeded"), Stage(name=stage, state="Running"), Stage(name="Train", state="Pending"))
    status = step(BEGUN, HEAD, *WORKERS, report=make_report("Train", stages=stages))
    assert (status.phase, status.workers_wanted) == (phase, 2)
    assert condition(status, "Ready") == ("False", reason)
    assert condition(status, "DataReady") == ("True", "Succeeded")
    assert condition(status, "Trained") == ("Unknown", "Pending")


def test_a_job_with_gates_says_that_it_has_not_been_judged() -> None:
    status = step(BEGUN, HEAD, *WORKERS, report=make_report("Train"), **GATED)
    assert condition(status, "GatesPassed") == ("Unknown", "Pending")
    assert TRAINING.condition("GatesPassed") is None  # a job without gates has no such fact


@pytest.mark.parametrize(
    ("verdicts", "expected", "message"),
    [
        (("Passed", "Passed"), ("True", "GatesPassed"), "2 of 2 gates passed"),
        (
            ("Failed", "Passed"),
            ("False", "GatesNotPassed"),
            "1 of 2 gates passed; task/exactMatch: Failed: 0.75 (0.7 to 0.8125), required at least 0.8",
        ),
        (
            ("Passed", "Inconclusive"),
            ("Unknown", "GatesInconclusive"),
            "1 of 2 gates passed; validation/loss: Inconclusive: 0.75 (0.7 to 0.8125), required at least 0.8",
        ),
    ],
    ids=["passed", "failed", "inconclusive"],
)
def test_the_verdict_on_the_gates_is_a_condition(verdicts, expected, message) -> None:
    status = step(TRAINING, HEAD, *WORKERS, report=make_report("Evaluate", evaluation=judged(*verdicts)), **GATED)
    assert condition(status, "GatesPassed") == expected
    assert status.condition("GatesPassed").message == message


def test_one_failed_gate_is_worse_than_one_that_cannot_be_told() -> None:
    assert judged("Inconclusive", "Failed").gates_verdict == "Failed"
    assert Evaluation().gates_verdict is None


def test_gates_that_are_passed_are_an_event() -> None:
    report = make_report("Publish", evaluation=judged("Passed", "Passed"))
    status = step(TRAINING, HEAD, report=report, **GATED)
    told = events_between(make_job(), TRAINING, status)
    assert [(event.type, event.reason, event.message) for event in told] == [
        ("Normal", "GatesPassed", "2 of 2 gates passed"),
    ]
    later = step(status, HEAD, report=report.model_copy(update={"outcome": "Succeeded"}), **GATED)
    assert [event.reason for event in events_between(make_job(), status, later)] == ["Succeeded"]


def test_a_model_that_is_held_back_is_a_job_that_failed_and_is_not_tried_again() -> None:
    why = Failure(stage="Evaluate", reason="GatesNotPassed", message="task/exactMatch is 0.75, and must be at least 0.8")
    report = make_report("Evaluate", evaluation=judged("Failed", "Passed"), outcome="Failed", failure=why)
    status = step(TRAINING, ended(message=termination_message(report)), **GATED)
    assert (status.phase, condition(status, "Failed")) == ("Failed", ("True", "GatesNotPassed"))
    assert condition(status, "GatesPassed") == ("False", "GatesNotPassed")
    assert condition(status, "Evaluated") == ("True", "Succeeded")
    assert condition(status, "Published") == ("False", "GatesNotPassed")
    assert condition(status, "Trained") == ("True", "Succeeded")
    assert status.failure.hint.startswith("The tuned model is not good enough")
    assert not status.failure.retryable
    assert status.evaluation == judged("Failed", "Passed")
    assert [(event.type, event.reason) for event in events_between(make_job(), TRAINING, status)] == [("Warning", "GatesNotPassed")]


@pytest.mark.parametrize(("verdict", "reason"), [("Failed", "GatesNotPassed"), ("Inconclusive", "GatesInconclusive")])
def test_a_trainer_that_calls_its_job_a_success_against_its_own_figures_is_not_believed(verdict, reason) -> None:
    report = make_report("Publish", evaluation=judged("Passed", verdict), outcome="Succeeded", message="published")
    status = step(TRAINING, HEAD, report=report, **GATED)
    assert condition(status, "Complete") == ("False", reason)
    assert condition(status, "Failed") == ("True", reason)


def test_figures_that_a_spec_has_no_gates_for_decide_nothing() -> None:
    report = make_report("Publish", evaluation=judged("Failed", "Failed"), outcome="Succeeded")
    assert condition(step(TRAINING, HEAD, report=report), "Complete") == ("True", "Succeeded")


def test_a_prompt_that_is_good_enough_completes_the_job_without_training() -> None:
    entries = (BaselineResult(prompt="few-shot", metric="task/exactMatch", value=0.97, low=0.9, high=1.0, best=True),)
    stages = (Stage(name="Prepare", state="Succeeded"), Stage(name="Baseline", state="Succeeded"), Stage(name="Train", state="Pending"))
    report = make_report("Train", stages=stages, baseline=entries, sufficient=True, outcome="Succeeded", workers_wanted=0)
    status = step(BEGUN, HEAD, report=report, **ASKED)
    assert (status.phase, status.baseline) == ("Complete", entries)
    assert condition(status, "Complete") == ("True", "BaselineSufficient")
    assert condition(status, "Failed")[0] == "False"
    for kind in ("Trained", "Evaluated", "Published"):
        assert condition(status, kind) == ("False", "BaselineSufficient")
    assert condition(status, "DataReady") == ("True", "Succeeded")


def test_only_a_job_that_says_what_is_sufficient_can_have_a_baseline_that_is() -> None:
    report = make_report("Publish", sufficient=True, outcome="Succeeded")
    assert condition(step(TRAINING, HEAD, report=report), "Complete") == ("True", "Succeeded")
    asked = {"evaluation": {"suites": SUITES}, "baseline": PROMPTS}
    assert condition(step(TRAINING, HEAD, report=report, **asked), "Complete") == ("True", "Succeeded")
    held = make_report("Publish", evaluation=judged("Failed", "Passed"), sufficient=True, outcome="Succeeded")
    assert condition(step(TRAINING, HEAD, report=held, **GATED, baseline=PROMPTS), "Failed") == ("True", "GatesNotPassed")


SEARCH = SearchSummary(trials=8, completed=5, failed=1, pruned=2, best=SearchBest(trial=3, value=1.25, parameters={"method.lora.rank": 8}))


def test_baseline_and_search_stay_in_the_status() -> None:
    entries = (BaselineResult(prompt="zero-shot", metric="task/exactMatch", value=0.5),)
    status = step(BEGUN, HEAD, *WORKERS, report=make_report("Train", baseline=entries, search=SEARCH))
    assert (status.baseline, status.search) == (entries, SEARCH)
    later = step(status, HEAD, *WORKERS, report=make_report("Evaluate"), now=at(60))
    assert (later.baseline, later.search) == (entries, SEARCH)


LONG = "x" * 1000


def measured_at_length() -> dict:
    """All that was measured, longer than a termination message may be."""
    others = tuple(ComparedResult(other=f"job-{index}", value=0.5, difference=Difference(value=0.25)) for index in range(8))
    results = tuple(EvaluationResult(metric=f"suite-{index}/f1", value=0.75, compared=others) for index in range(40))
    gates = judged("Passed", "Passed").gates
    health = (Health(name="forgetting", suite="general", verdict="Good", message=LONG),)
    evaluation = Evaluation(results=results, gates=gates, health=health, candidate=40, report="pvc://models/bot/report.md")
    return {"evaluation": evaluation, "data": DataSummary(train=90, made=40, made_samples=(LONG,)), "search": SEARCH}


def test_a_last_word_keeps_the_verdicts_where_the_details_are_too_long() -> None:
    said = measured_at_length()
    text = termination_message(make_report("Publish", outcome="Succeeded", **said))
    assert len(text.encode()) <= 4096
    brief = parse_report(text)
    assert brief.evaluation.gates == said["evaluation"].gates
    assert [found.verdict for found in brief.evaluation.health] == ["Good"]
    assert [result.metric for result in brief.evaluation.results] == [f"suite-{index}/f1" for index in range(8)]
    assert (brief.evaluation.candidate, brief.data.made, brief.search) == (40, 40, SEARCH)


def test_the_stages_of_a_job_that_succeeded_have_ended_also_where_its_last_word_came_alone() -> None:
    """The head may go from the training to its end between two questions of the operator's."""
    said = make_report("Publish", outcome="Succeeded", stages=stages("Publish", ended=True), **measured_at_length())
    after = step(TRAINING, ended(0, "Completed", termination_message(said)), **GATED)
    assert [(stage.name, stage.state) for stage in after.stages] == [(stage.name, "Succeeded") for stage in said.stages]
    told = TRAINING.model_copy(update={"stages": (*TRAINING.stages, Stage(name="Evaluate", state="Pending"))})
    silent = step(told, ended(0, "Completed", termination_message(said.model_copy(update={"stages": ()}))), now=at(90), **GATED)
    assert [(stage.name, stage.state) for stage in silent.stages] == [(name, "Succeeded") for name in ("Prepare", "Train", "Evaluate")]
    assert {stage.end_time for stage in silent.stages[1:]} == {silent.completion_time}


def test_a_last_word_that_leaves_out_details_takes_none_back() -> None:
    said = measured_at_length()
    report = make_report("Publish", **said)
    status = step(TRAINING, HEAD, report=report, **GATED)
    last = termination_message(report.model_copy(update={"outcome": "Succeeded"}))
    after = step(status, ended(0, "Completed", last), **GATED)
    assert after.phase == "Complete"
    assert (after.evaluation, after.data) == (said["evaluation"], said["data"])


def test_other_figures_replace_those_that_were_known() -> None:
    status = step(TRAINING, HEAD, *WORKERS, report=make_report("Evaluate", **measured_at_length()), **GATED)
    anew = judged("Failed", "Passed")
    assert step(status, HEAD, *WORKERS, report=make_report("Evaluate", evaluation=anew), **GATED).evaluation == anew
