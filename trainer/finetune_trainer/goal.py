"""A search's goal that the training does not measure: a suite's metric, of a trial's model, measured where the trial's driver runs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.evaluation import BASELINE
from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.answering import Candidate, outstanding, read_answers, suite_file, write_cases
from finetune_trainer.environment import environment_from, scratch_folder
from finetune_trainer.errors import JobError
from finetune_trainer.manifest import read_manifest
from finetune_trainer.measuring import questions_of, scored, suites_of
from finetune_trainer.result import RESULT
from finetune_trainer.search_space import config_of
from finetune_trainer.sources import resolve_storage
from finetune_trainer.storage import Storage, storage_at
from finetune_trainer.trials import FOLDER, RECORD


@dataclass(frozen=True)
class SuiteGoal:
    """Measures search.goal.metric. It reaches Ray's own records: no secret is in it."""

    metric: str
    """suite/metric."""
    config: Mapping[str, Any]
    """As the workers have it for the job without the search (Preparation.for_workers)."""
    group: str
    """Name of the attempt's search: no two runs of workers may have the same."""

    def __call__(self, trial: FineTuneJob, folder: Storage) -> float:
        """The metric of a trial that is trained; `folder` is the trial's. Raises JobError (EvaluationFailed, JudgeUnavailable, ...)."""
        from finetune_trainer.worker_group import fit_answers

        environment = environment_from(os.environ)
        mounts = environment.mounts()
        storage = storage_at(resolve_storage(trial.spec.output, mounts))
        own, scratch = storage.at(f".finetune/{trial.metadata.uid}"), scratch_folder(trial.metadata.uid, environment.attempt)
        suites = suites_of(trial, self.config["data"], storage, mounts, scratch / "cache", lambda _: None)
        asked = next(each for each in suites if self.metric in each.suite.metric_names)
        record: Any = folder.read_json(RECORD)
        step = self._step(folder)
        number = record["number"]

        questions = (questions_of(asked.suite, suite_file(asked.suite.name)),)
        tuned = Candidate(f"trial-{number}-step-{step}", questions, step=step)
        untuned = Candidate(BASELINE, questions) if asked.suite.judge is not None else None
        candidates = [each for each in (untuned, tuned) if each is not None]
        write_cases(own, suite_file(asked.suite.name), asked.cases)
        if any(outstanding(own, each) is not None for each in candidates):
            config = {**self.config, "config": config_of(self.config["config"], trial), "folder": f"{FOLDER}/{number}", "stage": "Search"}
            compute = trial.spec.compute.model_dump(mode="json", by_alias=True, exclude_none=True)
            config["trial"] = {"number": number, "values": record["values"], "compute": compute}
            config["candidates"] = [each.to_json() for each in candidates]
            fit_answers(trial.spec.compute, config, f"{self.group}-goal-{number}", scratch)
        answers = read_answers(own, tuned.name, questions[0])
        before = answers if untuned is None else read_answers(own, BASELINE, questions[0])
        if answers is None or before is None:
            raise JobError(Reason.WORKERS_LOST, f"trial {number}: its workers were taken away before they had answered")
        found = scored(asked, answers, before, trial.spec.evaluation.confidence)
        value = next(each.value for each in found if each.metric == self.metric)
        if value is None:
            problem = f"search.goal.metric: {self.metric} has no value: no example of the suite has a golden answer"
            raise JobError(Reason.EVALUATION_FAILED, problem)
        return value

    def _step(self, folder: Storage) -> int:
        manifest = read_manifest(folder, RESULT)
        if manifest is None:
            raise JobError(Reason.EVALUATION_FAILED, f"{folder.locate(RESULT)} is not there any more")
        return int(manifest["steps"])
