"""The results of other jobs that evaluation.compareWith names: of the same namespace, from the same output.storage."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from finetune_api.evaluation import JUDGED_METRICS, Suite
from finetune_api.reasons import Reason
from finetune_api.status import ComparedResult, Evaluation, EvaluationResult
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.answered import Answered, Case, read
from finetune_trainer.evaluation.evidence import RESULTS, report_folder
from finetune_trainer.evaluation.scores import Change, Measured, measured, published, told
from finetune_trainer.manifest import read_manifest
from finetune_trainer.storage import Storage

Value = TypeVar("Value", Case, Answered)
_SCORED_BY_MODELS = (*JUDGED_METRICS, "embeddingSimilarity")
_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")


@dataclass(frozen=True)
class OtherJob:
    """What another job has left."""

    name: str
    evaluation: Evaluation
    """Its results, as its report has them."""
    own: Storage
    """Its own folder in output.storage."""

    def result(self, metric: str) -> EvaluationResult | None:
        """The tuned model's result by a metric, where it was measured."""
        found = (result for result in self.evaluation.results if result.metric == metric)
        return next((result for result in found if result.value is not None), None)

    def answers(self, suite: str, cases: Sequence[Case]) -> tuple[Answered, ...]:
        """What its tuned model made of those of the cases that it was asked too, under this job's ids and in their order.

        Cases are the same where question and golden answer are, whatever their place: so figures of both jobs over them are paired. Empty
        where it was asked none of them, or its answers are not there any more.
        """
        if self.evaluation.candidate is None:
            return ()
        answers = {each.id: each for each in self._lines(f"answers/step-{self.evaluation.candidate}/{suite}.jsonl", Answered)}
        known = {_content(case): answers[case.id] for case in self._lines(f"suites/{suite}.jsonl", Case) if case.id in answers}
        return tuple(replace(known[content], id=case.id) for case in cases if (content := _content(case)) in known)

    def _lines(self, name: str, kind: type[Value]) -> Iterator[Value]:
        """The values of a file; none where it is absent or is not one."""
        try:
            lines = (line for line in (self.own.read_text(name) or "").split("\n") if line)  # a text may hold other line breaks
            yield from tuple(read(lines, kind))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return


def find_others(storage: Storage, job: FineTuneJob) -> tuple[OtherJob, ...]:
    """The jobs that this one is to be compared with, in the order of evaluation.compareWith. `storage` is output.storage.

    Raises JobError (ComparisonNotFound) where one has left no results.
    """
    return tuple(_find(storage, job, name) for name in job.spec.evaluation.other_jobs)


def reached(other: OtherJob, suites: Iterable[tuple[Suite, Sequence[Case]]], confidence: float) -> tuple[Measured, ...]:
    """The other's figures, as `changes` takes them: by its answers where it was asked the same, else as its report tells them.

    `suites` are this job's, with their cases. What a judge or an encoder says of the other's answers is taken from its report.
    """
    found = {result.metric: published(result) for result in other.evaluation.results if result.value is not None}
    for suite, cases in suites:
        by_text = tuple(metric for metric in suite.metrics if metric not in _SCORED_BY_MODELS)
        answers = {each.id: each for each in other.answers(suite.name, cases)} if by_text else {}
        asked = [case for case in cases if case.id in answers]
        if asked:
            own = measured(suite.model_copy(update={"metrics": by_text}), asked, answers.values(), confidence)
            found |= {each.metric: each for each in own}
    return tuple(found.values())


def beside(
    results: Iterable[EvaluationResult], others: Mapping[str, Sequence[Measured]], differences: Mapping[str, Sequence[Change]]
) -> tuple[EvaluationResult, ...]:
    """The results with those of others beside them; both are by the other's name, `differences` these results less the other's."""

    def compared(metric: str, name: str) -> ComparedResult | None:
        theirs = next((each for each in others[name] if each.metric == metric and each.value is not None), None)
        change = next((each for each in differences.get(name, ()) if each.metric == metric), None)
        return ComparedResult(other=name, value=theirs.value, difference=change and told(change)) if theirs else None

    return tuple(
        result.model_copy(update={"compared": tuple(each for name in others if (each := compared(result.metric, name)) is not None)})
        for result in results
    )


def _find(storage: Storage, job: FineTuneJob, name: str) -> OtherJob:
    folder = report_folder(job.metadata.namespace, name)
    uid = _owner(storage, folder)
    if uid is None:
        raise JobError(
            Reason.COMPARISON_NOT_FOUND,
            f"spec.evaluation.compareWith: {storage.locate(folder)} holds no results of the job {name}: name a job of the namespace "
            f"{job.metadata.namespace} that was measured with the same output.storage, or leave it out",
        )
    found: Any = storage.read_json(f"{folder}/{RESULTS}")
    try:
        evaluation = Evaluation.model_validate(found["evaluation"])
    except (TypeError, KeyError, ValidationError):
        raise JobError(
            Reason.COMPARISON_NOT_FOUND,
            f"spec.evaluation.compareWith: {storage.locate(folder)}/{RESULTS} cannot be read: run the job {name} again, or leave it out",
        ) from None
    return OtherJob(name, evaluation, storage.at(f".finetune/{uid}"))


def _owner(storage: Storage, folder: str) -> str | None:
    """The uid of the job whose report this is; None where it is no report, or names what cannot be a uid."""
    match read_manifest(storage, folder):
        case {"job": {"uid": str(uid)}} if _UID.fullmatch(uid):
            return uid
    return None


def _content(case: Case) -> str:
    """What a case asks and should be answered with."""
    asked = {name: value for name, value in asdict(case).items() if name not in ("id", "place")}
    return json.dumps(asked, sort_keys=True)
