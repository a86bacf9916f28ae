"""What a person reads: the columns as the job moves, and the end."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from finetune_api.status import (
    Artifact,
    Attempt,
    Condition,
    Evaluation,
    EvaluationResult,
    Failure,
    Metric,
    Progress,
    Status,
)
from finetune_operator.local.view import Lines, Screen, columns, duration, failure, summary

ENDED = {
    "phase": "Complete",
    "start_time": "2026-01-01T10:00:00Z",
    "completion_time": "2026-01-01T10:03:12Z",
    "progress": Progress(percent=100, step=54, total_steps=54, epoch=3.0),
    "evaluation": Evaluation(
        results=(EvaluationResult(metric="test/loss", value=0.25, baseline=3.5), EvaluationResult(metric="x/y", value=1.0))
    ),
}


def training(step, message=None, phase="Training"):
    progress = Progress(percent=step, step=step, total_steps=100)
    return Status(
        phase=phase, message=message or f"step {step} of 100", progress=progress, metrics=(Metric(name="train/loss", value=1.23456),)
    )


def text(*parts):
    console = Console(file=StringIO(), width=200)
    for part in parts:
        console.print(part, soft_wrap=True)
    return console.file.getvalue()


def test_the_columns_are_those_of_kubectl():
    assert columns(Status()) == ("Pending", "", "", "")
    assert columns(training(7)) == ("Training", "7%", "1.235", "step 7 of 100")
    assert columns(training(7, "first\nsecond"))[3] == "first"


def test_a_line_for_each_change_that_matters():
    out = StringIO()
    view = Lines(Console(file=out, width=60))
    states = [Status(phase="Pending", message="the head pod is starting")] * 2
    states += [training(step) for step in range(12)]
    states += [
        training(11, "waiting for workers"),
        training(11, "measuring", "Evaluating"),
        training(11, "[red]not markup[/red]", "Evaluating"),
    ]
    for state in states:
        view.update(state)
    view.note("a note " * 20)
    view.close()
    assert out.getvalue().splitlines() == [
        "PHASE       PROGRESS  LOSS     MESSAGE",
        "Pending                        the head pod is starting",
        "Training    0%        1.235    step 0 of 100",
        "Training    5%        1.235    step 5 of 100",
        "Training    10%       1.235    step 10 of 100",
        "Training    11%       1.235    waiting for workers",
        "Evaluating  11%       1.235    measuring",
        "Evaluating  11%       1.235    [red]not markup[/red]",
        "a note " * 20,
    ]


def test_a_terminal_keeps_the_last_state():
    out = StringIO()
    view = Screen(Console(file=out, force_terminal=True, width=120), "demo")
    view.update(training(42))
    view.note("a note")
    view.close()
    shown = out.getvalue()
    for words in ("PHASE", "demo", "Training", "42%", "1.235", "step 42 of 100", "a note"):
        assert words in shown


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0s"), (59.4, "59s"), (59.6, "1m0s"), (192, "3m12s"), (3600, "1h0m"), (93784, "26h3m"), (-3, "0s")]
)
def test_a_duration_is_written_as_kubectl_writes_ages(seconds, expected):
    assert duration(seconds) == expected


def test_the_summary_has_before_and_after_and_how_to_load_the_result():
    artifact = Artifact(kind="adapter", uri="pvc://c/out/adapter", digest="sha256:0", bytes=840_196)
    shown = text(*summary("demo", Status(**ENDED, artifacts=(artifact,)), "hf://a/b", {"pvc://c/out/adapter": Path("/x/adapter")}.get))
    assert "demo is complete after 3m12s (54 steps, 3 epochs)." in shown
    assert "test/loss   3.5000   0.2500" in shown
    assert "adapter: /x/adapter  (0.8 MB)" in shown
    assert "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('a/b'), '/x/adapter')" in shown


def test_the_summary_imports_what_peft_lacks_before_it_loads_a_bottleneck_adapter(tmp_path):
    (tmp_path / "bottleneck_adapter.py").touch()
    artifact = Artifact(kind="adapter", uri="pvc://c/out/adapter", digest="sha256:0", bytes=1)
    shown = text(*summary("demo", Status(**ENDED, artifacts=(artifact,)), "hf://a/b", lambda uri: tmp_path if "out" in uri else None))
    program = [line.strip() for line in shown.partition("adapter: ")[2].splitlines()[1:]]
    assert program[:3] == ["import sys", f"sys.path.insert(0, {str(tmp_path)!r})", "import bottleneck_adapter"]
    assert program[-1] == f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('a/b'), {str(tmp_path)!r})"


def test_the_summary_of_a_whole_model_in_a_bucket_names_the_bucket():
    artifact = Artifact(kind="model", uri="s3://bucket/model", digest="sha256:0", bytes=1)
    shown = text(*summary("demo", Status(**ENDED, artifacts=(artifact,)), "hf://a/b", lambda uri: None))
    assert "model: s3://bucket/model" in shown
    assert "from_pretrained" not in shown


def test_a_failure_says_why_what_to_do_and_where_to_look(tmp_path):
    log = tmp_path / "head.log"
    log.write_text("")
    failed = Condition(
        type="Failed",
        status="True",
        observed_generation=1,
        last_transition_time="2026-01-01T10:00:00Z",
        reason="BackoffLimitExceeded",
        message="attempt 2 was the last of 2 that failed: no memory",
    )
    status = Status(
        phase="Failed",
        attempt=Attempt(number=2),
        conditions=(failed,),
        failure=Failure(stage="Train", reason="OOMKilled", message="no memory", hint="Use less."),
    )
    shown = text(*failure("demo", status, log, "last words\n"))
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    assert lines == [
        "demo failed in Train: BackoffLimitExceeded (OOMKilled)",
        "attempt 2 was the last of 2 that failed: no memory",
        "Hint: Use less.",
        f"Log: {log}",
        "| last words",
    ]


def test_a_failure_without_details_still_has_the_hint_of_its_reason():
    shown = text(*failure("demo", Status(phase="Failed", failure=Failure(reason="DeadlineExceeded", message="too long")), None, ""))
    assert "demo failed: DeadlineExceeded" in shown
    assert "Hint: Raise activeDeadlineSeconds" in shown


def test_a_failed_job_may_keep_its_name_on_this_machine():
    shown = text(*failure("demo", Status(phase="Failed", failure=Failure(reason="InvalidSpec", message="a field is wrong")), None, ""))
    assert "Hint: Correct the field that the message names, and run it again.\n" in shown
