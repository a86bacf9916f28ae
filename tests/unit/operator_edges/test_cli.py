import re
from pathlib import Path

import pytest
from tests.unit.operator_edges.job_file import JOB
from typer.testing import CliRunner

from finetune_api.status import (
    Artifact,
    Attempt,
    BestCheckpoint,
    Checkpoints,
    Evaluation,
    EvaluationResult,
    Failure,
    Metric,
    ModelSummary,
    Stage,
    Status,
)
from finetune_operator.cli import app
from finetune_operator.words import status_lines


def run(*arguments: str, text: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, input=text, env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output


def test_help_names_the_commands() -> None:
    code, output = run("--help")
    assert code == 0
    for command in ("operator", "local", "validate", "list", "status"):
        assert re.search(rf"\b{command}\b", output), command


def test_help_of_the_operator_lists_its_settings_with_their_defaults() -> None:
    code, output = run("operator", "--help")
    assert code == 0
    for name, words in (
        ("TOKEN_KEY_FILE", "file with a secret of 16 bytes or more, the same for every replica; must be set"),
        ("POLL_SECONDS", "how often a running job's report is read when nothing else happens (10)"),
        ("LEADER_ELECTION", "whether several replicas agree on one that works (true)"),
        ("WATCH_NAMESPACES", "namespaces whose jobs are run, by commas; empty is all"),
        ("LOG_LEVEL", "DEBUG, INFO, WARNING or ERROR (INFO)"),
    ):
        assert re.search(rf"FINETUNE_{name}: {re.escape(words)} *$", output, re.MULTILINE), name


def test_version_is_told() -> None:
    code, output = run("--version")
    assert code == 0
    assert re.fullmatch(r"finetune \S+\n", output)


def test_good_manifest_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    assert run("validate", str(tmp_path / "job.yaml")) == (0, f"{tmp_path}/job.yaml: accepted\n")


def test_manifest_from_standard_input() -> None:
    assert run("validate", "-", text=JOB) == (0, "-: accepted\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("lora: {}", "lora: {rnak: 8}"), "line 7: spec.method.lora.rnak: unknown field; did you mean rank?"),
        (("lora: {}", "lora: {int: 8}"), "line 7: spec.method.lora.int: unknown field; known here: rank"),
        (("hf://org/model", "http://169.254.169.254/model"), "line 5: spec.model.source: "),
        (("  output: {storage: pvc://models/bot}\n", ""), "spec: output.storage must be set, or profileRef name a profile that offers one"),
        (("kind: FineTuneJob", "kind: Job"), "holds Job; what is checked has kind: FineTuneJob or TuningProfile"),
        (("spec:", "spec: ["), "line "),
        (("name: bot", "name: Bot"), "metadata.name: "),
    ],
)
def test_bad_manifest_is_refused_with_line_field_and_remedy(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace(*change))
    code, output = run("validate", str(file))
    assert code == 1
    assert f"{file}: " in output
    assert words in output


def test_every_bad_file_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(JOB)
    (tmp_path / "bad.yaml").write_text(JOB.replace("lora", "loar"))
    code, output = run("validate", str(tmp_path / "absent.yaml"), str(tmp_path / "bad.yaml"), str(tmp_path / "good.yaml"))
    assert code == 2
    assert "absent.yaml: cannot be read" in output
    assert "did you mean lora?" in output
    assert "good.yaml: accepted" in output


def test_file_sources_are_for_local_runs(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("hf://org/model", "file://model"))
    assert run("validate", str(file))[0] == 1
    assert run("validate", "--local", str(file))[0] == 0


def test_cluster_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    code, output = run("list")
    assert code == 1
    assert len(output.splitlines()) == 1
    assert "Traceback" not in output


def test_status_in_words() -> None:
    status = Status(
        phase="Failed",
        message="it did not work",
        attempt=Attempt(number=2, failures=2, preemptions=1),
        stages=(Stage(name="Prepare", state="Succeeded", start_time="2026-01-01T00:00:00Z", end_time="2026-01-01T00:01:00Z"),),
        model=ModelSummary(parameters=494032768, trained_parameters=1081344),
        metrics=(Metric(name="train/loss", value=1.25),),
        checkpoints=Checkpoints(best=BestCheckpoint(step=40, uri="pvc://models/bot/40", metric="validation/loss", value=1.5)),
        warnings=("the data is small",),
        evaluation=Evaluation(results=(EvaluationResult(metric="test/loss", value=1.0, baseline=2.5),)),
        artifacts=(Artifact(kind="adapter", uri="pvc://models/bot/adapter", digest="sha256:0", bytes=42),),
        failure=Failure(reason="OOMKilled", message="too little memory", hint="Raise memory."),
    )
    assert status_lines(status) == [
        "Failed: it did not work",
        "attempt 2 (2 failed, 1 preempted)",
        "Prepare    Succeeded  2026-01-01T00:00:00Z 2026-01-01T00:01:00Z",
        "model: 494032768 parameters, 1081344 of them trained",
        "train/loss: 1.25",
        "best checkpoint: step 40, validation/loss 1.5",
        "test/loss: 2.5 before, 1 after",
        "adapter: pvc://models/bot/adapter (42 bytes)",
        "warning: the data is small",
        "failure: OOMKilled: too little memory",
        "what to do: Raise memory.",
        "more of it: finetune explain OOMKilled",
    ]


def test_status_of_a_job_that_no_operator_has_seen() -> None:
    assert status_lines(Status())[0] == "not seen by an operator yet"
