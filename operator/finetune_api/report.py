"""What the trainer tells the operator: served by the head at GET /report, and at the end as the termination message and report.json."""

import json
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.fields import StatusModel
from finetune_api.monitoring_status import FRESH_MAX, FreshFigure
from finetune_api.scrub import brief, last_lines, scrub
from finetune_api.status import (
    BASELINES_MAX,
    LOG_MAX,
    TEXT_MAX,
    WARNING_LENGTH_MAX,
    Artifact,
    BaselineResult,
    Checkpoints,
    Count,
    DataSummary,
    Evaluation,
    Failure,
    Metric,
    ModelSummary,
    Plan,
    Progress,
    Resolved,
    SearchSummary,
    Stage,
    Text,
    Usage,
    Warnings,
)

REPORT_PORT = 8000
TERMINATION_MESSAGE_BYTES = 4096
"""Largest termination message that the kubelet keeps."""

EXIT_SUCCEEDED = 0
EXIT_FAILED = 1
"""The trainer failed and says why in its report."""
EXIT_INTERRUPTED = 143
"""The trainer was asked to stop, and left a checkpoint where there was something to save."""

Outcome = Literal["Succeeded", "Failed", "Interrupted"]


class Report(StatusModel):
    """The state of one attempt, whole: a later report replaces an earlier one."""

    job_uid: Annotated[str, Field(max_length=64)]
    """The job that it belongs to."""
    attempt: Count
    """The attempt that it belongs to."""
    revision: Count = 0
    """Grows with each change that the operator should act on at once: a stage, the workers wanted, the outcome."""
    message: Text = ""
    """What is being done, for people."""
    warnings: Warnings = ()
    """What the job's owner should look at although the job goes on; those of the whole attempt so far."""
    workers_wanted: Count = 0
    """Worker pods that the current stage needs."""
    stages: Annotated[tuple[Stage, ...], Field(max_length=16)] = ()
    resolved: Resolved | None = None
    model: ModelSummary | None = None
    data: DataSummary | None = None
    progress: Progress | None = None
    metrics: Annotated[tuple[Metric, ...], Field(max_length=64)] = ()
    checkpoints: Checkpoints | None = None
    resumed_step: Count | None = None
    """Step that this attempt went on from; None where it began anew."""
    lost_steps: Count = 0
    """Steps of earlier attempts, or of workers lost in this one, that had to be done again in this attempt."""
    baseline: Annotated[tuple[BaselineResult, ...], Field(max_length=BASELINES_MAX)] = ()
    search: SearchSummary | None = None
    evaluation: Evaluation | None = None
    artifacts: Annotated[tuple[Artifact, ...], Field(max_length=16)] = ()
    fresh: Annotated[tuple[FreshFigure, ...], Field(max_length=FRESH_MAX)] = ()
    """What a measuring run has found, in the suites' order."""
    plan: Plan | None = None
    usage: Usage | None = None
    """What this attempt alone has used."""
    outcome: Outcome | None = None
    """How the attempt ended; None while it runs."""
    sufficient: bool = False
    """The outcome is Succeeded because a prompt alone reached baseline.sufficientIf: nothing was trained or published."""
    failure: Failure | None = None
    """Why, where the outcome is Failed."""


def parse_report(text: str | bytes) -> Report | None:
    """The report in a body or termination message, or None where it is not one (cut off, or another program's words).

    What it says in words is scrubbed: whoever wrote it may not have done so.
    """
    try:
        return _scrubbed(Report.model_validate_json(text))
    except ValueError:
        return None


def _scrubbed(report: Report) -> Report:
    """The report with its texts for people scrubbed, within their bounds."""
    failure, evaluation = report.failure, report.evaluation
    if failure is not None:
        hint, log = failure.hint, failure.log
        told = {"message": brief(failure.message, TEXT_MAX), "hint": hint and brief(hint, TEXT_MAX), "log": log and scrub(log)[-LOG_MAX:]}
        failure = failure.model_copy(update=told)
    if evaluation is not None:
        health = tuple(found.model_copy(update={"message": brief(found.message, TEXT_MAX)}) for found in evaluation.health)
        evaluation = evaluation.model_copy(update={"health": health})
    warnings = tuple(brief(warning, WARNING_LENGTH_MAX) for warning in report.warnings)
    texts = {"message": brief(report.message, TEXT_MAX), "warnings": warnings, "failure": failure, "evaluation": evaluation}
    return report.model_copy(update={name: text for name, text in texts.items() if text != getattr(report, name)})


def termination_message(report: Report) -> str:
    """The report within the kubelet's limit: what report.json in the storage also says is left out first, then words of the failure."""
    brief = _brief(report)
    for said, dropped in (
        (report, ()),
        (report, ("metrics",)),
        (brief, ("metrics",)),
        (brief, _MANY_OPTIONAL),
        (brief, _ALL_BUT_VERDICTS),
        (brief, (*_ALL_BUT_VERDICTS, "stages")),
        (brief, _ALL_OPTIONAL),
        (_without_log(brief), _ALL_OPTIONAL),
    ):
        text = _json_without(said, dropped)
        if len(text.encode()) <= TERMINATION_MESSAGE_BYTES:
            return text
    shorter = report.failure and report.failure.model_copy(
        update={"message": report.failure.message[:_FEW_CHARACTERS], "hint": None, "log": None}
    )
    return _json_without(report.model_copy(update={"failure": shorter}), _ALL_OPTIONAL)


def brief_evaluation(evaluation: Evaluation) -> Evaluation:
    """What must not be lost of what was measured: the verdicts, and a few results."""
    results = tuple(result.model_copy(update={"compared": ()}) for result in evaluation.results[:_FEW_RESULTS])
    health = tuple(found.model_copy(update={"message": ""}) for found in evaluation.health)
    return evaluation.model_copy(update={"results": results, "health": health})


def brief_data(data: DataSummary) -> DataSummary:
    """The counts without samples."""
    return data.model_copy(update={"made_samples": ()})


def _brief(report: Report) -> Report:
    evaluation, data, why = report.evaluation, report.data, report.failure
    briefly = {
        "fresh": tuple(_brief_figure(each) for each in report.fresh[:_FEW_FIGURES]),
        "evaluation": evaluation and brief_evaluation(evaluation),
        "data": data and brief_data(data),
        "failure": why and why.model_copy(update={"log": last_lines(why.log, _FEW_CHARACTERS) if why.log else None}),
    }
    return report.model_copy(update={**briefly, "baseline": ()})


def _without_log(report: Report) -> Report:
    return report.model_copy(update={"failure": report.failure and report.failure.model_copy(update={"log": None})})


def _brief_figure(figure: FreshFigure) -> FreshFigure:
    """A figure to six digits."""
    rounded = {name: None if (value := getattr(figure, name)) is None else float(f"{value:.6g}") for name in ("value", "low", "high")}
    return figure.model_copy(update=rounded)


def _json_without(report: Report, dropped: Collection[str]) -> str:
    fields = {key: value for key, value in report.to_json().items() if key not in dropped}
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


_FEW_CHARACTERS = 500
"""Of a failure's message, where it is too long in bytes: a character takes up to four, and up to six in JSON."""
_FEW_RESULTS = 8
_FEW_FIGURES = 32
_MANY_OPTIONAL = ("metrics", "progress", "usage", "resolved", "warnings")
_ALL_BUT_VERDICTS = (*_MANY_OPTIONAL, "model", "data", "search", "checkpoints", "message")
_ALL_OPTIONAL = (*_ALL_BUT_VERDICTS, "stages", "evaluation", "artifacts", "fresh")
