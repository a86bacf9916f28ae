"""The tables of what was measured, as a terminal shows them."""

from io import StringIO
from pathlib import Path

from rich.console import Console

from finetune_api.status import (
    BaselineResult,
    Condition,
    Difference,
    Evaluation,
    EvaluationResult,
    Failure,
    GateResult,
    Health,
    Status,
)
from finetune_operator.local.measured import measured
from finetune_operator.local.view import failure, summary

BASELINE = (
    BaselineResult(prompt="zero-shot", metric="task/f1", value=0.5),
    BaselineResult(prompt="few-shot", model="other", metric="task/f1", value=0.625, low=0.5, high=0.75, best=True),
)
EVALUATION = Evaluation(
    results=(
        EvaluationResult(metric="task/f1", value=0.875, baseline=0.5, difference=Difference(value=0.375, low=0.25, high=0.5)),
        EvaluationResult(metric="task/judgeScore", value=0.75),
    ),
    gates=(
        GateResult(metric="task/f1", verdict="Passed", observed=0.875, low=0.8125, high=0.9375, required="at least 0.8"),
        GateResult(metric="retention/loss", verdict="Failed", observed=0.5, required="larger by at most 0.05", over="baseline"),
    ),
    health=(Health(name="forgetting", suite="retention", verdict="Bad", message="the loss rose by 0.5"),),
    report="pvc://models/bot/report.md",
)


def shown(parts) -> list[str]:
    """The lines that are printed, without blanks at their ends, and without blank lines."""
    console = Console(file=StringIO(), width=200)
    for part in parts:
        console.print(part, soft_wrap=True)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_what_was_measured_is_told_in_tables() -> None:
    status = Status(baseline=BASELINE, evaluation=EVALUATION)
    assert shown(measured(status, lambda uri: Path("/here") / uri.rpartition("/")[2])) == [
        "prompt             metric     value   interval",
        "zero-shot          task/f1   0.5000",
        "few-shot (other)   task/f1   0.6250   (0.5000 to 0.7500)   best",
        "                  before    after    change   interval",
        "task/f1           0.5000   0.8750   +0.3750   (+0.2500 to +0.5000)",
        "task/judgeScore            0.7500",
        "gate task/f1             Passed   0.8750 (0.8125 to 0.9375)   required: at least 0.8",
        "gate retention/loss      Failed   0.5000                      required: larger by at most 0.05 than baseline",
        "forgetting (retention)   Bad                                  the loss rose by 0.5",
        "report: /here/report.md",
    ]


def test_a_job_that_measured_nothing_shows_nothing() -> None:
    assert shown(measured(Status(), lambda uri: None)) == []
    assert shown(measured(Status(evaluation=Evaluation()), lambda uri: None)) == []


def test_a_model_that_is_not_good_enough_shows_its_figures_and_no_log(tmp_path) -> None:
    log = tmp_path / "head.log"
    log.write_text("")
    why = Failure(stage="Evaluate", reason="GatesNotPassed", message="1 of 2 gates passed")
    lines = shown(failure("demo", Status(phase="Failed", evaluation=EVALUATION, failure=why), log, "last words\n"))
    assert lines[0] == "demo failed in Evaluate: GatesNotPassed"
    assert lines[2].strip().startswith("Hint: The tuned model is not good enough")
    assert "gate task/f1             Passed   0.8750 (0.8125 to 0.9375)   required: at least 0.8" in lines
    assert lines[-1] == "report: pvc://models/bot/report.md"


def test_a_prompt_that_is_good_enough_is_the_summary() -> None:
    ready = Condition(
        type="Ready", status="True", observed_generation=1, last_transition_time="2026-01-01T10:00:00Z", reason="BaselineSufficient"
    )
    status = Status(phase="Complete", message="few-shot reaches task/f1 0.6", baseline=BASELINE, conditions=(ready,))
    lines = shown(summary("demo", status, "hf://a/b", lambda uri: None))
    assert lines[:2] == ["demo is complete.", "Nothing was trained: few-shot reaches task/f1 0.6"]
    assert lines[-1].endswith("best")


def test_a_trainers_words_are_neither_markup_nor_commands_to_the_terminal() -> None:
    hostile = "see [/x] [red]y \x1b]0;title\x07"
    evaluation = Evaluation(
        results=(EvaluationResult(metric="task/[/f1]", value=0.5),),
        gates=(GateResult(metric="task/[/f1]", verdict="Failed", required=hostile),),
        health=(Health(name="forgetting", suite="[/s]", verdict="Bad", message=hostile),),
    )
    baseline = (BaselineResult(prompt="[/p]", model="[/m]", metric="task/[/f1]", value=0.5),)
    lines = "\n".join(shown(measured(Status(baseline=baseline, evaluation=evaluation), lambda _: None)))
    assert lines.count("see [/x] [red]y") == 2
    assert "[/p] ([/m])" in lines
    assert "\x1b" not in lines
