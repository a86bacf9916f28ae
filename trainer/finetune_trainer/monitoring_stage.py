"""A measuring run, after the release: the published model, or the endpoint that serves it, on fresh data. It trains and publishes nothing.

    .finetune/<uid>/monitoring/    what the last run asked and was answered, and its report; a run begins with it empty

The operator holds the figures against those of the release.
"""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from finetune_api.evaluation import BASELINE, Suite
from finetune_api.monitoring import MonitoredSuite, MonitoringPlan, measured_again
from finetune_api.monitoring_status import FreshFigure
from finetune_api.reasons import Reason
from finetune_api.report import Report, parse_report
from finetune_api.v1alpha1 import Endpoint
from finetune_trainer.answering import Candidate
from finetune_trainer.attempt import REPORT, Attempt
from finetune_trainer.crew import Crew
from finetune_trainer.environment import own_folder
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.answered import Case
from finetune_trainer.evaluation.given import Givers
from finetune_trainer.evaluation.scores import Measured, finite
from finetune_trainer.manifest import read_manifest
from finetune_trainer.measuring import Answers, Asked, Measuring, scored

CANDIDATE = "published"


def measure_again(attempt: Attempt) -> None:
    """The whole run: fresh data, the answers, the figures in the report. Raises JobError, InterruptedRunError."""
    plan = attempt.job.spec.monitoring
    assert plan is not None  # noqa: S101 - that is what makes it a measuring run
    attempt.reporter.start_stage("Prepare", "reading fresh data", workers_wanted=0)
    attempt.storage.check_writable()
    attempt.storage.remove(own_folder(attempt.job))  # what another run was told says nothing of this one
    suites = _fresh_suites(attempt, plan)
    for asked in suites:
        if asked.suite.encoder is not None or asked.suite.judge is not None:
            asked.givers.check()
    if plan.endpoint is not None:
        attempt.reporter.start_stage("Evaluate", "asking the endpoint", workers_wanted=0)
        figures = _of_endpoint(attempt, plan.endpoint, suites)
    else:
        figures = _of_artifact(attempt, suites)
    told = tuple(_told(each) for each in figures)
    for each in told:
        attempt.console.say(f"{each.metric}: {each.value} ({each.low} to {each.high}), {each.n} examples")
    attempt.reporter.update(fresh=told, workers_wanted=0)


def _told(measured: Measured) -> FreshFigure:
    return FreshFigure(
        metric=measured.metric, value=measured.value, low=finite(measured.low), high=finite(measured.high), n=measured.n or None
    )


def _fresh_suites(attempt: Attempt, plan: MonitoringPlan) -> tuple[Asked, ...]:
    """The suites with the cases that their sources hold now. Raises JobError (DatasetNotFound, DatasetInvalid, ...)."""
    spec, metrics = attempt.job.spec, measured_again(attempt.job.spec)
    sources = {suite.name: (f"monitoring.suites[{place}]", suite) for place, suite in enumerate(plan.suites)}
    found = []
    for place, suite in enumerate(spec.evaluation.suites):
        if suite.name not in metrics:
            continue
        cases = _fresh_cases(attempt, suite, *sources[suite.name])
        where, namespace = f"evaluation.suites[{place}]", attempt.job.metadata.namespace
        asked = suite.model_copy(update={"metrics": metrics[suite.name]})
        givers = Givers(asked, where, attempt.storage, namespace, attempt.mounts, attempt.cache, attempt.tell)
        found.append(Asked(asked, cases, givers))
        attempt.console.say(f"{sources[suite.name][0]}: {len(cases):,} examples for the suite {suite.name}")
    return tuple(found)


def _fresh_cases(attempt: Attempt, suite: Suite, where: str, source: MonitoredSuite) -> tuple[Case, ...]:
    """What a source holds now: of a suite with a limit the last so many, since a source that grows has what is new at its end."""
    from finetune_trainer.data.inputs import input_of
    from finetune_trainer.data.left_out import REJECTS, LeftOut
    from finetune_trainer.data.reading import Source, cases_of

    folder = attempt.scratch / "fresh" / suite.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with LeftOut(folder) as left_out:
            return cases_of(Source(where, input_of(source, "test", attempt.mounts), kind="suite", limit=suite.limit), attempt.job, left_out)
    finally:
        with suppress(FileNotFoundError):
            attempt.own.write_text(f"{suite.name}-{REJECTS}", (folder / REJECTS).read_text(encoding="utf-8"))
        shutil.rmtree(folder, ignore_errors=True)


def _of_endpoint(attempt: Attempt, endpoint: Endpoint, suites: tuple[Asked, ...]) -> list[Measured]:
    """The figures of what is served: no worker is asked for. Raises JobError (EndpointUnavailable, ...)."""
    from finetune_trainer.asking import served
    from finetune_trainer.served_answers import ENDPOINT, answers_of

    behind, confidence = served(endpoint, ENDPOINT, attempt.mounts), attempt.job.spec.evaluation.confidence
    figures: list[Measured] = []
    for asked in suites:
        answers = answers_of(behind, asked.suite, asked.cases, attempt.own.at(f"answers/{asked.suite.name}"), attempt.tell)
        figures += scored(asked, answers, answers, confidence)
    return figures


def _of_artifact(attempt: Attempt, suites: tuple[Asked, ...]) -> list[Measured]:
    """The figures of the published artifact, which the workers load and ask. Raises JobError, InterruptedRunError."""
    release = _release(attempt)
    attempt.reporter.start_stage("Evaluate", "measuring the published model", workers_wanted=attempt.job.spec.compute.workers.max)
    told = _Told(release.resolved.model_revision if release.resolved else None)
    with Crew(attempt) as crew:
        measuring = _Fresh(attempt, told, crew, suites)
        tuned = measuring.artifact(release.artifacts[0].kind)
        compared = any("judgeWinRate" in asked.suite.metrics for asked in suites)
        untuned = measuring.candidate(BASELINE)
        measuring.ask((tuned, *((untuned,) if compared else ())), "Evaluate")
    attempt.reporter.announce(workers_wanted=0, message="comparing with the figures of the release")
    against: Answers = measuring.answers(untuned if compared else tuned)
    return list(measuring.measured(tuned, against))


def _release(attempt: Attempt) -> Report:
    """What the job said when it published. Raises JobError (ModelNotFound) where that, or the artifact, is no longer there."""
    job, storage = attempt.job, attempt.storage
    left = storage.at(f".finetune/{job.metadata.uid}").read_text(REPORT)
    release = parse_report(left) if left is not None else None
    if release is None or release.outcome != "Succeeded" or not release.artifacts:
        raise JobError(Reason.MODEL_NOT_FOUND, f"{storage.locate('')} no longer holds the report of what this job has published")
    kind = release.artifacts[0].kind
    manifest = read_manifest(storage, kind)
    if manifest is None or (manifest.get("job") or {}).get("uid") != job.metadata.uid:
        raise JobError(Reason.MODEL_NOT_FOUND, f"{storage.locate(kind)} no longer holds what this job has published")
    return release


@dataclass(frozen=True)
class _Told:
    """What the workers are told."""

    revision: str | None
    """Of the base model."""
    data: str = ""
    for_workers: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "for_workers", {"revision": self.revision, "config": {}, "data": self.data})


class _Fresh(Measuring):
    """The suites with their fresh cases, asked of the published model."""

    def __init__(self, attempt: Attempt, told: _Told, crew: Crew, suites: tuple[Asked, ...]) -> None:
        super().__init__(attempt, told, crew)
        self.__dict__["suites"] = suites  # in place of those that the job was evaluated on

    @property
    def tasks(self) -> tuple[tuple[str, Suite], ...]:
        """None: lm-eval's tasks do not change."""
        return ()

    def artifact(self, kind: str) -> Candidate:
        """The published model as the ecosystem loads it: an adapter around the base model, or a whole model."""
        output = self._attempt.job.spec.output
        if kind == "adapter":
            return Candidate(CANDIDATE, self.candidate(CANDIDATE).questions, artifact=kind)
        source: Mapping[str, object] = {"source": f"{(output.storage or '').rstrip('/')}/{kind}"}
        secret = {"secretRef": {"name": output.secret_ref.name}} if output.secret_ref else {}
        return self.candidate(CANDIDATE, model={**source, **secret})
