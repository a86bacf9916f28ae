"""What candidates are asked, and what they reach: the workers answer, the head scores. For the stages Baseline and Evaluate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from finetune_api.evaluation import BASELINE, SCORED_METRICS, Suite
from finetune_api.status import StageName
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.answering import Candidate, Questions, answered, outstanding, read_answers, suite_file, write_cases
from finetune_trainer.asking import Say
from finetune_trainer.attempt import Attempt
from finetune_trainer.crew import Crew
from finetune_trainer.data.cases import read_cases
from finetune_trainer.data.examples import SUITE
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.evaluation.given import Givers
from finetune_trainer.evaluation.lm_eval import measured_tasks, read_results
from finetune_trainer.evaluation.scores import Measured, measured
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage

Answers = Mapping[str, Sequence[Answered]]
"""By suite."""


@dataclass(frozen=True)
class Asked:
    """A suite with its cases."""

    suite: Suite
    cases: tuple[Case, ...]
    givers: Givers
    """Who else scores its answers."""


def suites_of(job: FineTuneJob, data: str, storage: Storage, mounts: Mounts, cache: Path, say: Say) -> tuple[Asked, ...]:
    """The suites that have cases; `data` is the folder of the prepared data in `storage`, output.storage. Raises JobError."""
    folder, found = storage.location(data), []
    for place, suite in enumerate(job.spec.evaluation.suites):
        if suite.lm_eval is not None:
            continue
        split = str(suite.source) if suite.data_source() is None else f"{SUITE}{suite.name}"
        givers = Givers(suite, f"evaluation.suites[{place}]", storage, job.metadata.namespace, mounts, cache, say)
        found.append(Asked(suite, tuple(read_cases(folder, split)[: suite.limit]), givers))
    return tuple(found)


def scored(asked: Asked, own: Sequence[Answered], baseline: Sequence[Answered], confidence: float) -> tuple[Measured, ...]:
    """The metrics of one suite; `baseline` are the untuned model's answers. Raises JobError (JudgeUnavailable, ...)."""
    given = asked.givers.given(asked.cases, own, baseline)
    return measured(asked.suite, asked.cases, own, confidence, given)


class Measurable(Protocol):
    """What is known of a job that is measured."""

    @property
    def data(self) -> str:
        """Folder of the prepared data in output.storage."""
        ...

    @property
    def for_workers(self) -> dict[str, Any]:
        """What a group of workers is told."""
        ...


class Measuring:
    """The suites of a job, asked of one candidate after another."""

    def __init__(self, attempt: Attempt, preparation: Measurable, crew: Crew) -> None:
        self._attempt, self._preparation, self._crew = attempt, preparation, crew

    @cached_property
    def suites(self) -> tuple[Asked, ...]:
        """The suites that have cases. Raises JobError (StorageUnavailable)."""
        attempt = self._attempt
        return suites_of(attempt.job, self._preparation.data, attempt.storage, attempt.mounts, attempt.cache, attempt.tell)

    def training_cases(self) -> list[Case]:
        """The training examples, where a prompt shows some."""
        return read_cases(self._attempt.storage.location(self._preparation.data), "train")

    def candidate(self, name: str, *, step: int | None = None, model: Mapping[str, object] | None = None) -> Candidate:
        """A candidate that is asked the suites as they are."""
        questions = tuple(questions_of(asked.suite, suite_file(asked.suite.name)) for asked in self.suites)
        return Candidate(name, questions, step=step, model=model)

    def prompted(self, name: str, cases_of: Callable[[Asked], Sequence[Case]], model: Mapping[str, object] | None = None) -> Candidate:
        """An untuned candidate that is asked them in another way."""
        questions = []
        for asked in self.suites:
            file = f"suites/{name}/{asked.suite.name}.jsonl"
            write_cases(self._attempt.own, file, cases_of(asked))
            questions.append(questions_of(asked.suite, file))
        return Candidate(name, tuple(questions), model=model, whole=True)

    def ask(self, candidates: Sequence[Candidate], stage: StageName) -> None:
        """Have the workers answer what is not answered yet: where nothing is left, none is asked for. Raises JobError."""
        own = self._attempt.own
        for asked in self.suites:
            write_cases(own, suite_file(asked.suite.name), asked.cases)

        def left() -> int:
            return sum(self.left(candidate) for candidate in candidates)

        if not left():
            return
        from finetune_trainer.worker_group import fit_answers

        compute = self._attempt.job.spec.compute
        self._attempt.reporter.announce(workers_wanted=compute.workers.max)
        config = {**self._preparation.for_workers, "candidates": [each.to_json() for each in by_weights(candidates)], "stage": stage}
        config["tasks"] = {where: suite.name for where, suite in self.tasks}

        def moved() -> int:
            return sum(answered(own, candidate) - self._tasks_left(candidate) for candidate in candidates)

        self._crew.run(lambda group, _: fit_answers(compute, config, group, self._attempt.scratch), lambda: None if left() else True, moved)

    def left(self, candidate: Candidate) -> int:
        """Suites that a candidate is still to be asked. Raises JobError."""
        found = outstanding(self._attempt.own, candidate)
        return (len(found.questions) if found else 0) + self._tasks_left(candidate)

    @property
    def waits(self) -> bool:
        """Whether the answers are scored by other models, which the workers would be held for."""
        return any(suite.judge is not None or suite.encoder is not None for suite in self._attempt.job.spec.evaluation.suites)

    @property
    def tasks(self) -> tuple[tuple[str, Suite], ...]:
        """The suites of lm-eval's tasks, each with its field in the spec."""
        suites = enumerate(self._attempt.job.spec.evaluation.suites)
        return tuple((f"evaluation.suites[{place}]", suite) for place, suite in suites if suite.lm_eval is not None)

    def _tasks_left(self, candidate: Candidate) -> int:
        """Suites of tasks that a candidate is still to be measured on; one that is asked in another way is not."""
        if candidate.whole:
            return 0
        return sum(read_results(self._attempt.own, candidate.name, suite) is None for _, suite in self.tasks)

    def answers(self, candidate: Candidate) -> Answers:
        """What a candidate has answered, all of it. Raises JobError."""
        found = {each.suite: read_answers(self._attempt.own, candidate.name, each) for each in candidate.questions}
        return {suite: answers for suite, answers in found.items() if answers is not None}

    def measured(self, candidate: Candidate, baseline: Answers) -> tuple[Measured, ...]:
        """The metrics of all suites; `baseline` are the untuned model's own answers. Raises JobError (JudgeUnavailable, ...)."""
        confidence, answers = self._attempt.job.spec.evaluation.confidence, self.answers(candidate)
        found: list[Measured] = []
        for asked in self.suites:
            found += scored(asked, answers[asked.suite.name], baseline[asked.suite.name], confidence)
        for _, suite in self.tasks:
            results = None if candidate.whole else read_results(self._attempt.own, candidate.name, suite)
            found += measured_tasks(suite, results, confidence) if results is not None else ()
        return tuple(found)

    def ask_baseline(self, stage: StageName, *others: Candidate) -> Answers:
        """The untuned model's answers, asked for together with what others are asked for."""
        untuned = self.candidate(BASELINE)
        self.ask((untuned, *others), stage)
        return self.answers(untuned)


def by_weights(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those with the same weights one after the other, since the workers hold one model at a time."""
    places: dict[str, int] = {}
    for each in candidates:
        places.setdefault(each.weights, len(places))
    return sorted(candidates, key=lambda each: places[each.weights])


def questions_of(suite: Suite, file: str) -> Questions:
    """What of a suite's cases is to be known for its metrics."""
    losses = suite.role == "forgetting" or any(metric in SCORED_METRICS for metric in suite.metrics)
    return Questions(suite.name, suite.max_new_tokens if suite.generates else 0, losses=losses, cases=file)
