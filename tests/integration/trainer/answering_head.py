"""A head whose workers answer before the training, train, and answer again, in one session; installed into its process by the tests."""

from typing import Any

from finetune_api.reasons import Reason
from finetune_trainer import run
from finetune_trainer.answering import Candidate, Questions, write_cases
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.answered import Case
from finetune_trainer.ray_cluster import driver, wait_for_workers
from finetune_trainer.worker_group import fit, fit_answers

PATIENCE = 600.0
"""Seconds for the workers to join."""
CASES = 900
QUESTIONS = Questions("task", max_new_tokens=100)
"""Long answers of a model that never ends them: time to kill a worker."""


def cases() -> list[Case]:
    """As the training's data is: the word of each number's last digit."""
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return [Case(f"{number:06d}", words[number % 10], prompt=f"{number} ends in ") for number in range(CASES)]


def install() -> None:
    """Have this take the training's place."""

    def answer_and_train(attempt: Any, preparation: Any, *_: object) -> None:
        job, own, compute = attempt.job, attempt.own, attempt.job.spec.compute
        config = {"revision": preparation.resolved.model_revision, "config": preparation.config, "data": preparation.data}
        write_cases(own, QUESTIONS.file, cases())
        attempt.reporter.start_stage("Train", "answering", workers_wanted=compute.workers.max)
        attempt.ray_head.wait_ready()

        def answer(name: str, *candidates: Candidate) -> None:
            told = {**config, "stage": "Train", "candidates": [each.to_json() for each in candidates]}
            fit_answers(compute, told, name, attempt.scratch)

        with driver(attempt.environment):
            attempt.interruption.listen()
            wait_for_workers(compute, PATIENCE, lambda joined: None)
            other = {"source": job.spec.model.source.replace("/model", "/other")}
            answer("before", Candidate("baseline", (QUESTIONS,)), Candidate("model-other", (QUESTIONS,), model=other))
            fit(compute, config, "training", attempt.scratch)
            steps = job.spec.training.epochs * 5
            answer("after", Candidate(f"step-{steps}", (QUESTIONS,), step=steps))
        raise JobError(Reason.DATASET_INVALID, "the answers are there")

    run.train = answer_and_train  # type: ignore[assignment]
