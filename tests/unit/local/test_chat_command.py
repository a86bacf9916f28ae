"""`finetune chat`: what the command line asks of the trainer's process, and what it refuses before it starts one."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from finetune_operator.cli import app
from finetune_operator.local import chat

META = {"name": "tuned", "namespace": "default", "uid": "u1", "resourceVersion": "7"}
SPEC = {"model": {"source": "file://models/tiny"}, "output": {"storage": "pvc://claim/out"}}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments that the trainer's process was given, and the job that it could read."""
    found: list[Any] = []

    def run(arguments: list[str]) -> int:
        job = Path(arguments[1])
        found.extend([arguments, json.loads(job.read_text()) if arguments[0] == "--job" else None])
        return 3

    monkeypatch.setattr(chat, "_run", run)
    return found


def test_a_job_that_has_run_is_handed_on_with_its_whole_paths(started: list[Any], tmp_path: Path) -> None:
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tuned"}, "spec": SPEC}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump_all([{"kind": "ConfigMap"}, manifest]))
    (tmp_path / "tuned.status.yaml").write_text(yaml.safe_dump({**manifest, "metadata": META, "status": {"phase": "Running"}}))
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "job.yaml"), "-p", "Why?", "-p", "How?", "--plain", "--system", "Be brief."])
    assert result.exit_code == 3
    arguments, job = started
    assert arguments[2:] == [
        *("--volumes", str(tmp_path / ".finetune")),
        *("--system", "Be brief.", "--tokens", "256", "--plain", "--prompt", "Why?", "--prompt", "How?"),
    ]
    assert job["spec"] == {"model": {"source": f"file://{tmp_path}/models/tiny"}, "output": {"storage": "pvc://claim/out"}}
    assert job["metadata"] == {"name": "tuned", "namespace": "default", "uid": "u1"}
    assert job["status"] == {"phase": "Running"}


def test_folders_are_handed_on(started: list[Any], tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["chat", "--base", "owner/name", "--adapter", str(tmp_path), "--tokens", "9"]).exit_code == 3
    assert started[0] == ["--base", "owner/name", "--adapter", str(tmp_path), "--tokens", "9"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["--base", "a"], ["--adapter", "."], ["--base", "a", "--adapter", ".", "--model", "."], ["job.yaml", "--base", "a"]],
)
def test_nothing_is_asked_of_nobody(started: list[Any], arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["chat", *arguments])
    assert result.exit_code == 2
    assert "--adapter or --model" in " ".join(result.output.replace("│", " ").split())
    assert not started


def test_a_job_that_has_not_run_and_folders_that_are_not_there_are_refused(started: list[Any], tmp_path: Path) -> None:
    manifest = {"kind": "FineTuneJob", "metadata": {"name": "tuned"}, "spec": SPEC}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(manifest))
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "job.yaml")])
    assert (result.exit_code, f"tuned has not run here: `finetune local {tmp_path}/job.yaml` runs it" in result.output) == (2, True)
    assert CliRunner().invoke(app, ["chat", str(tmp_path / "none.yaml")]).exit_code == 2
    assert CliRunner().invoke(app, ["chat", "--base", "a", "--adapter", str(tmp_path / "none")]).exit_code == 2
    assert not started


def test_the_process_is_the_trainers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A name that is no folder, with an adapter that holds nothing: the trainer itself says so."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert CliRunner().invoke(app, ["chat", "--base", str(tmp_path), "--adapter", str(tmp_path), "-p", "Why?"]).exit_code == 1
