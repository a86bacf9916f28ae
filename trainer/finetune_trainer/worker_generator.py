"""A model that the job's own workers write texts with, as a served one does elsewhere (endpoint_generator)."""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from finetune_trainer.answering import Candidate, Questions, answered, read_answers, write_cases
from finetune_trainer.attempt import Attempt
from finetune_trainer.completions import Messages
from finetune_trainer.crew import Crew
from finetune_trainer.evaluation.answered import Case
from finetune_trainer.manifest import digest_of

GENERATOR = "generator"


class WorkerGenerator:
    """A generator. A context: workers are asked for when there is something to write, and go at its end."""

    def __init__(self, attempt: Attempt, crew: Crew, revision: str, model: Mapping[str, Any] | None, *, is_chat: bool) -> None:
        """`revision` is that of the job's base model, which writes where `model`, a ModelSource in JSON, is None."""
        self._attempt, self._crew, self._revision, self._model, self._is_chat = attempt, crew, revision, model, is_chat

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._attempt.reporter.announce(workers_wanted=0)

    def generate(self, prompts: Sequence[Messages], max_new_tokens: int) -> Iterator[str]:
        """What it says to each conversation, in their order. Raises JobError, and InterruptedRunError where the attempt is stopped."""
        from finetune_trainer.worker_group import fit_answers

        attempt, own, compute = self._attempt, self._attempt.own, self._attempt.job.spec.compute
        cases = [self._case(str(place), prompt) for place, prompt in enumerate(prompts)]
        name = digest_of({"cases": [[case.prompt, list(case.messages)] for case in cases], "model": self._model, "most": max_new_tokens})
        questions = Questions(f"made-{name[7:23]}", max_new_tokens, losses=False)
        write_cases(own, questions.file, cases)
        candidate = Candidate(GENERATOR, (questions,), model=self._model)
        config = {"revision": self._revision, "config": {}, "candidates": [candidate.to_json()], "stage": "Prepare"}
        attempt.reporter.announce(workers_wanted=compute.workers.max, message="waiting for the workers, which write examples")
        for answer in self._crew.run(
            lambda group, _: fit_answers(compute, config, group, attempt.scratch),
            lambda: read_answers(own, GENERATOR, questions),
            lambda: answered(own, candidate),
        ):
            yield answer.text

    def _case(self, name: str, prompt: Messages) -> Case:
        if self._is_chat:
            return Case(name, "", messages=tuple(prompt))
        return Case(name, "", prompt="\n\n".join(str(turn["content"]) for turn in prompt))
