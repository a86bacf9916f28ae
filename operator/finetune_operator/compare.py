"""`finetune compare JOB...`: what several jobs have reached, side by side."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_api import KIND
from finetune_api.evaluation import LOWER_IS_BETTER
from finetune_api.scrub import scrub
from finetune_api.status import Evaluation, EvaluationResult, Status
from finetune_operator.asking import Context, Place, absent, ask, place_of, read_jobs
from finetune_operator.manifest import EXIT_REFUSED, ManifestError, exit_code, read_file

_SAME = 1e-6
"""Relative: smaller differences of two measurements of one model are rounding."""
_STEP = re.compile("step-[0-9]+")
_ABSENT = Text("-", style="dim")


def compare(
    jobs: Annotated[
        list[str],
        typer.Argument(metavar="JOB...", help="Names of jobs in the cluster, and files NAME.status.yaml that `finetune local` wrote."),
    ],
    namespace: Place = "",
    context: Context = "",
) -> None:
    """Set what jobs have reached side by side: each metric with its interval, the best of each row marked."""
    statuses = with_checkpoints(_statuses(jobs, namespace, context))
    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # a pipe has no edge to break lines at
    console.print(table_of(statuses))
    for note in notes_of(statuses):
        console.print(Text(scrub(note)), style="dim")


def with_checkpoints(statuses: Mapping[str, Status]) -> dict[str, Status]:
    """With a column for each earlier checkpoint that a job was compared with, after the job's own."""
    found: dict[str, Status] = {}
    for name, status in statuses.items():
        found[name] = status
        results = status.evaluation.results if status.evaluation else ()
        others = dict.fromkeys(each.other for result in results for each in result.compared)
        for step in filter(_STEP.fullmatch, others):
            found[f"{name} {step}"] = Status(evaluation=Evaluation(results=tuple(_of_step(result, step) for result in results)))
    return found


def _of_step(result: EvaluationResult, step: str) -> EvaluationResult:
    """What a checkpoint reached by a result's metric; of its interval alone nothing is told."""
    value = next((each.value for each in result.compared if each.other == step), None)
    return EvaluationResult(metric=result.metric, value=value, baseline=result.baseline, n=result.n)


def table_of(statuses: Mapping[str, Status]) -> Table:
    """A row for each metric that any of the jobs was measured by, in the order that they are met."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("METRIC", "UNTUNED", *statuses):
        table.add_column(Text(title), no_wrap=True)
    table.add_row("phase", "", *(Text(status.phase or "") for status in statuses.values()))
    if any(status.evaluation and status.evaluation.gates for status in statuses.values()):
        table.add_row("gates", "", *(_gates(status) for status in statuses.values()))
    for metric in _metrics(statuses):
        results = [_result(status, metric) for status in statuses.values()]
        best = _best(metric, results)
        cells = [_cell(result, is_best=result is not None and result.value == best) for result in results]
        table.add_row(Text(scrub(metric)), _untuned(results), *cells)
    return table


def notes_of(statuses: Mapping[str, Status]) -> list[str]:
    """What a reader of the table has to know."""
    notes = ["* the best of its row; in brackets its confidence interval"] if len(statuses) > 1 else []
    results = {metric: [_result(status, metric) for status in statuses.values()] for metric in _metrics(statuses)}
    differing = [metric for metric, found in results.items() if len({result.n for result in found if result and result.n is not None}) > 1]
    if differing:
        notes.append(f"measured on different numbers of examples, so not quite comparable: {', '.join(differing)}")
    untuned = [metric for metric, found in results.items() if _differs(found)]
    if untuned:
        notes.append(f"the untuned models differ, or what they were measured on: {', '.join(untuned)}")
    return notes


def _statuses(jobs: Sequence[str], namespace: str, context: str) -> dict[str, Status]:
    """By the name of the column: the job's, or the file's where two jobs have one name. Ends the command where one cannot be read."""
    names = tuple(job for job in dict.fromkeys(jobs) if not _is_file(job))
    namespace = place_of(namespace, context) if names else namespace
    known = dict(zip(names, ask(read_jobs(namespace, names, context)) if names else [], strict=True))
    found: dict[str, Status] = {}
    for job in dict.fromkeys(jobs):
        raw = _read_file(Path(job)) if _is_file(job) else known[job]
        if raw is None:
            raise absent(job, namespace)
        name = str(raw["metadata"].get("name", job))
        found[scrub(job if name in found else name)] = _status(job, raw)
    return found


def _is_file(job: str) -> bool:
    """Whether an argument names a file: no job's name has a dot or a slash."""
    return "." in job or "/" in job


def _read_file(path: Path) -> dict[str, Any]:
    """The first job in a file. Ends the command where there is none."""
    try:
        manifests = read_file(path)
    except ManifestError as error:
        raise _refused(f"{path}: {error}", exit_code(error)) from None
    job = next((manifest for manifest in manifests if manifest.get("kind") == KIND and isinstance(manifest.get("metadata"), dict)), None)
    if job is None or not job.get("status"):
        lacking = f"no {KIND}" if job is None else f"a {KIND} without a status"
        raise _refused(f"{path}: holds {lacking}; give the file NAME.status.yaml that `finetune local` wrote")
    return dict(job)


def _status(job: str, raw: Mapping[str, Any]) -> Status:
    try:
        return Status.model_validate(raw.get("status") or {})
    except ValidationError as error:
        raise _refused(f"{job}: its status cannot be read: {error.error_count()} fields are wrong") from None


def _refused(message: str, code: int = EXIT_REFUSED) -> typer.Exit:
    typer.echo(scrub(message), err=True)
    return typer.Exit(code)


def _metrics(statuses: Mapping[str, Status]) -> list[str]:
    evaluations = (status.evaluation for status in statuses.values() if status.evaluation)
    return list(dict.fromkeys(result.metric for evaluation in evaluations for result in evaluation.results))


def _result(status: Status, metric: str) -> EvaluationResult | None:
    results = status.evaluation.results if status.evaluation else ()
    return next((result for result in results if result.metric == metric), None)


def _best(metric: str, results: Sequence[EvaluationResult | None]) -> float | None:
    """The best value; None where fewer than two jobs have one."""
    values = [result.value for result in results if result is not None and result.value is not None]
    if len(values) < 2:
        return None
    return min(values) if metric.rpartition("/")[2] in LOWER_IS_BETTER else max(values)


def _untuned(results: Sequence[EvaluationResult | None]) -> Text:
    value = next((result.baseline for result in results if result is not None and result.baseline is not None), None)
    if value is None:
        return _ABSENT
    return Text("differs", style="yellow") if _differs(results) else Text(_figure(value))


def _differs(results: Sequence[EvaluationResult | None]) -> bool:
    """Whether the jobs' untuned models are not the same, as far as a metric tells."""
    values = [result.baseline for result in results if result is not None and result.baseline is not None]
    return any(not math.isclose(value, values[0], rel_tol=_SAME, abs_tol=1e-12) for value in values)


def _cell(result: EvaluationResult | None, *, is_best: bool) -> Text:
    if result is None or result.value is None:
        return _ABSENT
    known = result.low is not None and result.high is not None
    interval = f" [{_figure(result.low)}, {_figure(result.high)}]" if known else ""
    return Text.assemble((f"{_figure(result.value)}{'*' if is_best else ''}", "bold green" if is_best else ""), (interval, "dim"))


def _gates(status: Status) -> Text:
    gates = status.evaluation.gates if status.evaluation else ()
    if not gates:
        return _ABSENT
    passed = sum(gate.verdict == "Passed" for gate in gates)
    return Text(f"{passed} of {len(gates)} passed", style="green" if passed == len(gates) else "red")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
