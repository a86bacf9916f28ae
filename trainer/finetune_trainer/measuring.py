"""What candidates are asked, and what they reach: the workers answer, the head scores. For the stages Baseline and Evaluate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from finetune_api.evaluation import Suite
from finetune_api.status import StageName
from finetune_trainer.answering import Candidate, Questions, outstanding, read_answers, suite_file, write_cases
from finetune_trainer.attempt import Attempt, Preparation
from finetune_trainer.crew import Crew
from finetune_trainer.data.cases import read_cases
from finetune_trainer.data.examples import SUITE
from finetune_trainer.evaluation.answered import BASELINE, Answered, Case
from finetune_trainer.evaluation.given import Givers
from finetune_trainer.evaluation.scores import Measured, measured

TOKEN_METRICS = ("loss", "perplexity", "tokenAccuracy")
"""Metrics of the golden answers' own tokens."""

Answers = Mapping[str, Sequence[Answered]]
"""By suite."""


@dataclass(frozen=True)
class Asked:
    """A suite with its cases."""

    suite: Suite
    cases: tuple[Case, ...]
    givers: Givers
    """Who else scores its answers."""


class Measuring:
    """The suites of a job, asked of one candidate after another."""

    def __init__(self, attempt: Attempt, preparation: Preparation, crew: Crew) -> None:
        self._attempt, self._preparation, self._crew = attempt, preparation, crew

    @cached_property
    def suites(self) -> tuple[Asked, ...]:
        """The suites that have cases. Raises JobError (StorageUnavailable)."""
        attempt, found = self._attempt, []
        folder = attempt.storage.location(self._preparation.data)
        for place, suite in enumerate(attempt.job.spec.evaluation.suites):
            if suite.lm_eval is not None:
                continue
            split = str(suite.source) if suite.data_source() is None else f"{SUITE}{suite.name}"
            cases = tuple(read_cases(folder, split)[: suite.limit])
            where, namespace = f"evaluation.suites[{place}]", attempt.job.metadata.namespace
            givers = Givers(suite, where, attempt.storage, namespace, attempt.mounts, attempt.cache, attempt.tell)
            found.append(Asked(suite, cases, givers))
        return tuple(found)

    def training_cases(self) -> list[Case]:
        """The training examples, where a prompt shows some."""
        return read_cases(self._attempt.storage.location(self._preparation.data), "train")

    def candidate(self, name: str, *, step: int | None = None, model: Mapping[str, object] | None = None) -> Candidate:
        """A candidate that is asked the suites as they are."""
        questions = tuple(_questions(asked.suite, suite_file(asked.suite.name)) for asked in self.suites)
        return Candidate(name, questions, step=step, model=model)

    def prompted(self, name: str, cases_of: Callable[[Asked], Sequence[Case]], model: Mapping[str, object] | None = None) -> Candidate:
        """An untuned candidate that is asked them in another way."""
        questions = []
        for asked in self.suites:
            file = f"suites/{name}/{asked.suite.name}.jsonl"
            write_cases(self._attempt.own, file, cases_of(asked))
            questions.append(_questions(asked.suite, file))
        return Candidate(name, tuple(questions), model=model, whole=True)

    def ask(self, candidates: Sequence[Candidate], stage: StageName) -> None:
        """Have the workers answer what is not answered yet: where nothing is left, none is asked for. Raises JobError."""
        own = self._attempt.own
        for asked in self.suites:
            write_cases(own, suite_file(asked.suite.name), asked.cases)

        def left() -> list[Candidate]:
            return [each for candidate in candidates if (each := outstanding(own, candidate)) is not None]

        waiting = left()
        if not waiting:
            return
        from finetune_trainer.worker_group import fit_answers

        compute, total = self._attempt.job.spec.compute, sum(len(each.questions) for each in waiting)
        self._attempt.reporter.announce(workers_wanted=compute.workers.max)
        config = {**self._preparation.for_workers, "candidates": [each.to_json() for each in candidates], "stage": stage}
        self._crew.run(
            lambda group, _: fit_answers(compute, config, group, self._attempt.scratch),
            lambda: None if left() else True,
            lambda: total - sum(len(each.questions) for each in left()),
        )

    def answers(self, candidate: Candidate) -> Answers:
        """What a candidate has answered, all of it. Raises JobError."""
        found = {each.suite: read_answers(self._attempt.own, candidate.name, each) for each in candidate.questions}
        return {suite: answers for suite, answers in found.items() if answers is not None}

    def measured(self, answers: Answers, baseline: Answers) -> tuple[Measured, ...]:
        """The metrics of all suites; `baseline` are the untuned model's own answers. Raises JobError (JudgeUnavailable, ...)."""
        confidence = self._attempt.job.spec.evaluation.confidence
        found: list[Measured] = []
        for asked in self.suites:
            own, before = answers[asked.suite.name], baseline[asked.suite.name]
            given = asked.givers.given(asked.cases, own, before)
            found += measured(asked.suite, asked.cases, own, confidence, given)
        return tuple(found)

    def ask_baseline(self, stage: StageName, *others: Candidate) -> Answers:
        """The untuned model's answers, asked for together with what others are asked for."""
        untuned = self.candidate(BASELINE)
        self.ask((untuned, *others), stage)
        return self.answers(untuned)


def _questions(suite: Suite, file: str) -> Questions:
    losses = suite.role == "forgetting" or any(metric in TOKEN_METRICS for metric in suite.metrics)
    return Questions(suite.name, suite.max_new_tokens if suite.generates else 0, losses=losses, cases=file)
