"""The search: trials of other values, by Ray Tune, before the training.

Each trial is the same loop for a job of its own values, in a folder of its own, on its share of the workers; all share the prepared data.
What is known of the trials stands in output.storage (see trials.py), and the next values follow from that alone (see suggestion.py): an
attempt that ends costs what the running trials have done since their last checkpoints, and no finished trial.
"""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from finetune_api.reasons import Reason
from finetune_api.search import SearchPlan
from finetune_api.status import SearchBest, SearchSummary
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.environment import Environment, scratch_folder
from finetune_trainer.errors import JobError
from finetune_trainer.manifest import digest_of
from finetune_trainer.search_space import check_comparable, trials_of
from finetune_trainer.storage import Storage
from finetune_trainer.suggestion import suggested
from finetune_trainer.trial_run import LOSS, Measure, RunningTrial, Searching, dismiss, share_of
from finetune_trainer.trials import ReportDesk, Trial, Trials, best_of

ON_HEAD = {"node:__internal_head__": 0.001}
"""What a trial's driver asks of Ray: a place on the head's node, which Ray marks so, and no CPU."""
GRACE, HALVING = 0.25, 2
"""ASHA: a trial runs to a quarter of its steps at least; there and at the half the better half of those that came so far goes on."""
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last word is its goal, not the loss that ASHA goes by
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class SearchResult:
    """What a search has found."""

    trials: tuple[Trial, ...]
    best: Trial


class Search:
    """The search of one job. `config` is the worker group's for the job without the search; `own` is the job's folder of output.storage."""

    def __init__(self, job: FineTuneJob, config: Mapping[str, Any], own: Storage) -> None:
        """Read what is known of it. Raises JobError (InvalidSpec) where trials could not be compared."""
        assert job.spec.search is not None  # noqa: S101 - there is nothing to search for
        self.plan: SearchPlan = job.spec.search
        check_comparable(self.plan)
        self.total = trials_of(self.plan)
        self._job, self._config = job, config
        plan = self.plan.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"parallel"})
        self.trials = Trials(own, digest_of({"config": config["config"], "search": plan}))

    @property
    def over(self) -> bool:
        """Whether every trial has ended: there is nothing left to ask workers for."""
        return sum(trial.ended for trial in self.trials.all()) >= self.total

    def summary(self) -> SearchSummary:
        """How far the search is."""
        states = [trial.state for trial in self.trials.all()]
        best = best_of(self.trials.all(), self.plan.goal.mode)
        return SearchSummary(
            trials=self.total,
            completed=states.count("Completed"),
            failed=states.count("Failed"),
            pruned=states.count("Pruned"),
            best=None if best is None else SearchBest(trial=best.number, value=best.value or 0.0, parameters=dict(best.values)),
        )

    def result(self) -> SearchResult:
        """What the trials have come to. Raises JobError (SearchFailed) where none was completed."""
        trials = self.trials.all()
        best = best_of(trials, self.plan.goal.mode)
        if best is None:
            first = next((trial for trial in trials if trial.state == "Failed"), None)
            why = f"; the first one's reason: {first.reason}: {first.message}" if first else ""
            raise JobError(Reason.SEARCH_FAILED, f"none of the {len(trials)} trials of search.parameters was completed{why}")
        return SearchResult(trials, best)

    def tidy(self, ended: int) -> None:
        """Remove what a trial that has ended leaves, but for the best one's. It is not worth failing for."""
        trials = self.trials.all()
        best, before = (best_of(known, self.plan.goal.mode) for known in (trials, [each for each in trials if each.number != ended]))
        for trial in trials:
            if trial.ended and trial != best and (trial.number == ended or trial == before):
                with suppress(JobError):
                    self.trials.clear(trial.number)

    def run(
        self, environment: Environment, nodes: int, attempt: str, tell: Callable[[SearchSummary], None], measure: Measure | None = None
    ) -> SearchResult:
        """Run what has not ended yet, on `nodes` workers that have joined. The process must be Ray's driver; any thread may call it.

        `tell` hears of every change. `measure` measures a goal that the loop does not; it is called in another process of the head's node.
        Raises JobError (SearchFailed), and what would have befallen any trial, WorkersLost for one: the next attempt goes on.
        """
        if not self.over:
            compute, parallel = share_of(self._job, nodes)
            desk = None if self.plan.pruning == "none" else ray.remote(ReportDesk).options(num_cpus=0, resources=ON_HEAD).remote()
            searching = Searching(self._config, compute, attempt, desk, measure)
            self._fit(searching, parallel, str(scratch_folder(self._job.metadata.uid, environment.attempt) / "tune"), tell)
        for trial in self.trials.all():
            with suppress(JobError):  # not worth failing for
                self.trials.clear(trial.number)
        return self.result()

    def _fit(self, searching: Searching, parallel: int, folder: str, tell: Callable[[SearchSummary], None]) -> None:
        """Have Ray Tune run the trials, `parallel` at a time."""
        os.environ.update(QUIET)
        logging.getLogger("ray.tune").setLevel(logging.ERROR)

        driver = tune.with_parameters(TrialDriver, searching=searching)
        tuner = tune.Tuner(
            tune.with_resources(driver, tune.PlacementGroupFactory([ON_HEAD])),
            tune_config=tune.TuneConfig(
                search_alg=NextTrial(self, self._job.spec.training.seed, lambda: tell(self.summary()), searching.desk),
                scheduler=scheduler_of(self.plan, self.trials.all()),
                num_samples=self.total,
                max_concurrent_trials=parallel,
                # A driver imports for seconds. One whose trial is ended early goes, since its workers go with it.
                reuse_actors=searching.desk is None,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=searching.attempt,
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(fail_fast=True),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the trial's own are in its folder
            ),
        )
        for error in tuner.fit().errors:
            raise error if isinstance(error, Exception) else JobError(Reason.INTERNAL_ERROR, f"the driver of a trial failed: {error}")


class TrialDriver(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """A trial as Ray Tune runs it: each step is one report."""

    def setup(self, config: dict[str, Any], searching: Searching) -> None:
        """Begin."""
        self._searching = searching
        self._trial = RunningTrial(config["number"], config["values"], searching)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin with another trial; the one before has ended."""
        self._trial.end()
        self._trial = RunningTrial(new_config["number"], new_config["values"], self._searching)
        return True

    def step(self) -> dict[str, Any]:
        """The next report."""
        return self._trial.next()

    def cleanup(self) -> None:
        """Leave nothing that runs."""
        self._trial.end()


class NextTrial(Searcher):  # type: ignore[misc]  # Ray has no types
    """Says which trial comes next, first those that an earlier attempt had begun, and writes down what becomes of each."""

    def __init__(self, search: Search, seed: int, changed: Callable[[], None], desk: Any) -> None:  # noqa: ANN401 - Ray has no types
        super().__init__()
        self._search, self._seed, self._changed, self._desk = search, seed, changed, desk
        self._begun = [trial for trial in search.trials.all() if not trial.ended]
        self._numbers: dict[str, int] = {}
        self._broken = False

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        """Ray Tune pickles it, for whoever would go on from Ray's own files: nobody does."""
        return Searcher, ()

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial, as the driver takes it."""
        trial = self._begun.pop(0) if self._begun else self._new()
        if trial is None or self._broken:
            return str(Searcher.FINISHED)
        self._numbers[trial_id] = trial.number
        self._changed()
        return {"number": trial.number, "values": dict(trial.values)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Write down a loss on the way. One that goes on from a checkpoint comes by the same place again."""
        if "share" in result:
            number = self._numbers[trial_id]
            course = next(trial for trial in self._search.trials.all() if trial.number == number).course
            before = (point for point in course if point[0] < result["share"])
            self._search.trials.changed(number, course=(*before, (result["share"], result[LOSS])))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Write down how it ended. An error is none of the trial's: it ends the attempt, and the trials that run are run again."""
        number, result = self._numbers[trial_id], result or {}
        self._broken = self._broken or error
        self.on_trial_result(trial_id, result)  # Ray Tune tells the loss that ends a trial early here alone
        if "value" in result:
            self._search.trials.changed(number, state="Completed", value=float(result["value"]))
        elif "reason" in result:
            self._search.trials.changed(number, state="Failed", reason=result["reason"], message=result["message"])
        elif not self._broken:
            self._search.trials.changed(number, state="Pruned")
            dismiss(self._desk, number)
        self._search.tidy(number)
        self._changed()

    def _new(self) -> Trial | None:
        earlier = self._search.trials.all()
        number = len(earlier) + 1
        if number > self._search.total:
            return None
        values = suggested(self._search.plan, self._seed, number, earlier)
        if values is None:
            return None
        trial = Trial(number, values)
        self._search.trials.keep(trial)
        return trial

    def save(self, checkpoint_path: str) -> None:
        """What is to be kept is in output.storage."""

    def restore(self, checkpoint_path: str) -> None:
        """As above."""


def scheduler_of(plan: SearchPlan, trials: tuple[Trial, ...]) -> TrialScheduler:
    """What decides which trials are ended early (Li et al. 2020), with what is known of earlier trials' losses."""
    if plan.pruning == "none":
        return FIFOScheduler()
    asha = ASHAScheduler(time_attr="share", metric=LOSS, mode="min", max_t=1, grace_period=GRACE, reduction_factor=HALVING)
    for trial in trials:
        known = SimpleNamespace(trial_id=f"kept-{trial.number}")
        asha.on_trial_add(None, known)
        for share, loss in trial.course if trial.ended else ():
            asha.on_trial_result(None, known, {"share": share, LOSS: loss})
    return asha
