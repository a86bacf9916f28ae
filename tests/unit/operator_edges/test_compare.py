"""`finetune compare`: the results of jobs, in the cluster or run on this machine, side by side."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tests.builders import NAMESPACE, raw_job
from typer.testing import CliRunner

from finetune_api.status import ComparedResult, Evaluation, EvaluationResult, GateResult, Status
from finetune_operator import asking
from finetune_operator.cli import app
from finetune_operator.port import JobKey


def run(*arguments: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": "60", "NO_COLOR": "1"})
    return result.exit_code, [line.rstrip() for line in result.output.splitlines()]


def measured(*results: EvaluationResult, phase: Any = "Complete", gates: tuple[GateResult, ...] = ()) -> Status:
    return Status(phase=phase, evaluation=Evaluation(results=results, gates=gates))


def f1(value: float | None, **more: Any) -> EvaluationResult:
    return EvaluationResult(**{"metric": "task/f1", "value": value, "baseline": 0.4, **more})


def loss(value: float) -> EvaluationResult:
    return EvaluationResult(metric="validation/loss", value=value, baseline=2.5)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Status]:
    """The jobs of the namespace of the tests' jobs, by name."""
    jobs: dict[str, Status] = {}

    async def read(key: JobKey) -> Any:
        known = key.namespace == NAMESPACE and key.name in jobs
        return SimpleNamespace(job=raw_job(name=key.name, status=jobs[key.name])) if known else None

    @asynccontextmanager
    async def connect(context: str = "") -> AsyncIterator[Any]:
        yield SimpleNamespace(read=read)

    monkeypatch.setattr(asking, "connect", connect)
    return jobs


def write(folder: Path, name: str, job: Mapping[str, Any]) -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(dict(job)))
    return str(path)


def test_jobs_of_the_cluster_side_by_side(cluster: dict[str, Status]) -> None:
    gate = GateResult(metric="task/f1", verdict="Passed", observed=0.8, required="at least 0.7")
    failed = gate.model_copy(update={"verdict": "Failed"})
    cluster["first"] = measured(loss(1.25), f1(0.8123, low=0.78, high=0.84, n=500), gates=(gate, gate))
    cluster["second"] = measured(f1(0.85, low=0.82, high=0.88, n=500), loss(1.5), phase="Failed", gates=(gate, failed))
    cluster["third"] = measured(phase="Training")
    code, lines = run("-n", NAMESPACE, "first", "second", "third")
    assert code == 0
    assert [line.split("  ") for line in (" ".join(line.split()) for line in lines)] == [
        ["METRIC UNTUNED first second third"],
        ["phase Complete Failed Training"],
        ["gates 2 of 2 passed 1 of 2 passed -"],
        ["validation/loss 2.5 1.25* 1.5 -"],
        ["task/f1 0.4 0.8123 [0.78, 0.84] 0.85* [0.82, 0.88] -"],
        ["* the best of its row; in brackets its confidence interval"],
    ]


def test_earlier_checkpoints_have_columns_beside_their_jobs(cluster: dict[str, Status]) -> None:
    """Other jobs that a job was compared with have none: they are named where they are wanted."""
    others = (
        ComparedResult(other="older", value=0.1),
        ComparedResult(other="step-40", value=0.85),
        ComparedResult(other="step-80", value=0.5),
    )
    cluster["first"] = measured(f1(0.75, low=0.7, high=0.8, n=500, compared=others), loss(1.25))
    cluster["second"] = measured(f1(0.8, n=500))
    code, lines = run("-n", NAMESPACE, "first", "second")
    assert code == 0
    assert [" ".join(line.split()) for line in lines] == [
        "METRIC UNTUNED first first step-40 first step-80 second",
        "phase Complete Complete",
        "task/f1 0.4 0.75 [0.7, 0.8] 0.85* 0.5 0.8",
        "validation/loss 2.5 1.25 - - -",
        "* the best of its row; in brackets its confidence interval",
    ]


def test_no_line_is_broken_where_the_output_is_no_terminal(cluster: dict[str, Status]) -> None:
    for name in ("a" * 40, "b" * 40, "c" * 40):
        cluster[name] = measured(f1(0.5))
    _, lines = run("-n", NAMESPACE, *cluster)
    assert lines[0].split() == ["METRIC", "UNTUNED", *cluster]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("task/f1", (0.5, 0.75, 0.75), "0.5 0.75* 0.75*"),
        ("task/loss", (0.5, 0.75, 0.5), "0.5* 0.75 0.5*"),
        ("task/perplexity", (3.0, 2.0, None), "3 2* -"),
        ("general/hellaswag", (0.5, 0.75, None), "0.5 0.75* -"),
        ("task/f1", (0.5, None, None), "0.5 - -"),
    ],
)
def test_the_best_of_a_row_is_marked(cluster: dict[str, Status], metric: str, values: tuple[float | None, ...], best: str) -> None:
    for name, value in zip("abc", values, strict=True):
        cluster[name] = measured(EvaluationResult(metric=metric, value=value))
    _, lines = run("-n", NAMESPACE, "a", "b", "c")
    assert " ".join(lines[2].split()) == f"{metric} - {best}"


def test_files_that_finetune_local_wrote(tmp_path: Path, cluster: dict[str, Status]) -> None:
    cluster["bot"] = measured(f1(0.6))
    here = write(tmp_path, "bot.status.yaml", raw_job(name="bot", status=measured(f1(0.7))))
    other = write(tmp_path, "other.status.yaml", raw_job(name="other", status=measured(f1(0.5))))
    code, lines = run("-n", NAMESPACE, "bot", here, other)
    assert code == 0
    assert lines[0].split() == ["METRIC", "UNTUNED", "bot", here, "other"]
    assert lines[2].split() == ["task/f1", "0.4", "0.6", "0.7*", "0.5"]


def test_files_alone_need_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    file = write(tmp_path, "bot.status.yaml", raw_job(status=measured(f1(0.7))))
    assert run(file) == (0, ["METRIC    UNTUNED   bot", "phase               Complete", "task/f1   0.4       0.7"])


def test_what_cannot_be_compared_is_said(cluster: dict[str, Status]) -> None:
    cluster["a"] = measured(f1(0.5, n=100), loss(1.0))
    cluster["b"] = measured(f1(0.6, n=200, baseline=0.45), loss(1.0))
    _, lines = run("-n", NAMESPACE, "a", "b")
    assert lines[2].split() == ["task/f1", "differs", "0.5", "0.6*"]
    assert lines[-2:] == [
        "measured on different numbers of examples, so not quite comparable: task/f1",
        "the untuned models differ, or what they were measured on: task/f1",
    ]


def test_baselines_that_differ_by_rounding_are_the_same(cluster: dict[str, Status]) -> None:
    cluster["a"], cluster["b"] = measured(f1(0.5, baseline=0.4)), measured(f1(0.5, baseline=0.4 + 1e-9))
    _, lines = run("-n", NAMESPACE, "a", "b")
    assert lines[2].split() == ["task/f1", "0.4", "0.5*", "0.5*"]


def test_a_job_named_twice_stands_once(cluster: dict[str, Status]) -> None:
    cluster["a"] = measured(f1(0.5))
    _, lines = run("-n", NAMESPACE, "a", "a")
    assert lines[0].split() == ["METRIC", "UNTUNED", "a"]


def test_a_job_that_is_not_there(cluster: dict[str, Status]) -> None:
    cluster["a"] = measured(f1(0.5))
    assert run("-n", NAMESPACE, "a", "nobody") == (
        1,
        [f"there is no FineTuneJob nobody in namespace {NAMESPACE}; `finetune list -A` shows all"],
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", "line 1"),
        (b"kind: Pod\n", "holds no FineTuneJob; give the file"),
        (b"kind: FineTuneJob\n", "holds no FineTuneJob; give the file"),
        (b"kind: FineTuneJob\nmetadata: {name: x}\nstatus: {phase: Gone}\n", "its status cannot be read: 1 fields are wrong"),
    ],
)
def test_a_file_without_a_status_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.status.yaml"
    path.write_bytes(content)
    code, lines = run(str(path))
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"{path}: {words}")


def test_a_file_cannot_command_the_terminal(tmp_path: Path) -> None:
    job = raw_job(status=measured(EvaluationResult(metric="[red]a[/]/\x1b[31mf1", value=0.5), phase="Complete"))
    job["metadata"]["name"] = "\x1b]0;title\x07[bold]x"
    _, lines = run(write(tmp_path, "x.status.yaml", job))
    assert "\x1b" not in "".join(lines)
    assert "[red]a[/]/" in "".join(lines)
    assert "[bold]x" in lines[0]
