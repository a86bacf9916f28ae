"""One trial: its driver, which Ray Tune runs on the head's node, and what its workers run.

The driver asks for the trial's share of the workers, has them run the loop for the trial's job in the trial's folder, and measures.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.environment import Environment, environment_from, scratch_folder
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation import compare
from finetune_trainer.failures import as_job_error, failure_from
from finetune_trainer.ray_cluster import cpus_of, gpus_of
from finetune_trainer.result import Result, read_result
from finetune_trainer.search_space import Values, config_of, trial_job, with_values
from finetune_trainer.sources import resolve_storage
from finetune_trainer.storage import Storage, storage_at
from finetune_trainer.trials import FOLDER, trial_folder_in

if TYPE_CHECKING:
    from finetune_trainer.data.examples import Prepared
    from finetune_trainer.progress import WorkerProgress

Measure = Callable[[FineTuneJob, Storage], float]
"""What measures a suite's metric of a trial: called with the trial's job, whose compute is the trial's share, and the trial's folder."""
MEASUREMENTS = 8
"""Times that the validation loss of a trial is measured on the way, where that can end it early."""
MAX_GROUPS = 20
"""Times that a trial's workers may leave before its end, because one of them is taken away."""
OWN_FAULTS = frozenset(
    {
        Reason.TRAINING_DIVERGED,
        Reason.GPU_OUT_OF_MEMORY,
        Reason.OUT_OF_MEMORY,
        Reason.HOST_OUT_OF_MEMORY,
        Reason.MODEL_INVALID,
        Reason.INVALID_SPEC,
        Reason.EVALUATION_FAILED,
        Reason.INTERNAL_ERROR,
    }
)
"""What may come of a trial's values. Anything else (the workers, the storage, a teacher) would befall any trial, and ends the attempt."""
LOSS = "validation/loss"
LOOK_SECONDS = 0.5
"""How often a driver looks for reports, and a worker whether the trial is ended early."""
LEAVE_SECONDS = 300.0
"""The workers of a trial that is ended early have so long to take their step and leave."""


@dataclass(frozen=True)
class Searching:
    """What the trials of a search share. It reaches Ray's own records: no secret may be in it."""

    config: Mapping[str, Any]
    """As the worker group has it for the job without the search."""
    compute: Mapping[str, Any]
    """spec.compute of each trial: its share of the workers."""
    attempt: str
    """Name of the attempt: no two runs of Ray Train may have the same."""
    desk: Any = None
    """A ReportDesk's handle, where a trial's losses on the way can end it."""
    measure: Measure | None = None
    """Measures the goal where the loop does not."""


def run_trial(number: int, values: Values, searching: Searching) -> dict[str, Any]:
    """Train and measure. Returns {value}, or {reason, message} where the trial failed of its values.

    What is there of it already, in its folder, is not done again. Raises what would befall any trial.
    """
    environment = environment_from(os.environ)
    job = environment.job()
    own = storage_at(resolve_storage(job.spec.output, environment.mounts())).at(f".finetune/{job.metadata.uid}")
    folder = trial_folder_in(own.at(FOLDER), number)
    try:
        trial = trial_job(job, values, searching.compute)
        result = trained(trial, {"number": number, "values": dict(values)}, environment, folder, searching)
        return {"value": goal_value(job, trial, result, folder, searching.measure)}
    except Exception as error:
        if as_job_error(error).reason not in OWN_FAULTS:
            raise
        failure = failure_from(error, None)
        return {"reason": str(failure.reason), "message": failure.message}


def trained(trial: FineTuneJob, which: Mapping[str, Any], environment: Environment, folder: Storage, searching: Searching) -> Result:
    """The result of the trial's training: what is there, or what the workers make of it."""
    import ray

    from finetune_trainer.worker_group import fit

    config = {**searching.config, "config": config_of(searching.config["config"], trial)}
    config["trial"] = {**which, "compute": dict(searching.compute)}
    if (known := read_result(folder, config["config"])) is not None:
        return known
    config["desk"] = searching.desk
    scratch = scratch_folder(trial.metadata.uid, environment.attempt)
    for group in range(MAX_GROUPS):
        name = f"{searching.attempt}-trial-{which['number']}-{group}"
        fit(trial.spec.compute, config, name, scratch, train_on_worker)
        if (result := read_result(folder, config["config"])) is not None:
            return result
        if searching.desk is not None and ray.get(searching.desk.ended.remote(which["number"])):
            break
    raise JobError(Reason.WORKERS_LOST, f"trial {which['number']}: its workers were taken away {MAX_GROUPS} times before its end")


def goal_value(job: FineTuneJob, trial: FineTuneJob, result: Result, folder: Storage, measure: Measure | None) -> float:
    """The goal's metric: as the loop has measured it, else as `measure` does. Raises JobError (TrainingDiverged, EvaluationFailed)."""
    metric = job.spec.search.goal.metric if job.spec.search else LOSS
    measured = compare(result.before, result.after, per_token=trial.spec.objective.dpo is None)
    known = {found.metric: found.value for found in measured.results}
    if metric not in known and measure is None:
        raise JobError(Reason.EVALUATION_FAILED, f"search.goal.metric: {metric} was not measured")
    value = known[metric] if metric in known else measure(trial, folder) if measure else None
    if value is None or not math.isfinite(value):
        raise JobError(Reason.TRAINING_DIVERGED, f"{metric} is {value}")
    return value


class RunningTrial:
    """A trial that runs in a thread of its driver, and what its workers report meanwhile."""

    def __init__(self, number: int, values: Values, searching: Searching) -> None:
        self._number, self._desk = number, searching.desk
        self._outcome: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._waiting: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._run, args=(values, searching), name="trial", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """The next report, or at the end what came of the trial. Raises what would befall any trial."""
        import ray

        while not self._waiting:
            over = not self._thread.is_alive()
            if self._desk is not None:
                self._waiting += ray.get(self._desk.take.remote(self._number))
            if over and not self._waiting:
                if self._error is not None:
                    raise self._error
                return {**(self._outcome or {}), "done": True}
            self._thread.join(timeout=0 if self._waiting else LOOK_SECONDS)
        return self._waiting.pop(0)

    def end(self) -> None:
        """Have the workers leave, where they still train, and wait for that: Ray frees what they hold only if they leave by themselves."""
        if self._desk is not None and self._thread.is_alive():
            dismiss(self._desk, self._number)

    def _run(self, values: Values, searching: Searching) -> None:
        try:
            self._outcome = run_trial(self._number, values, searching)
        except BaseException as error:
            self._error = error
        finally:
            if self._desk is not None:
                self._desk.leave.remote(self._number)


def dismiss(desk: Any, number: int) -> None:  # noqa: ANN401 - Ray has no types
    """Have the workers of a trial leave, and wait for that.

    Ray Tune kills the driver of the last trial that it ends early after some ten seconds, and Ray would not free what its workers hold.
    """
    import ray

    ray.get(desk.end.remote(number))
    deadline = time.monotonic() + LEAVE_SECONDS
    while not ray.get(desk.left.remote(number)) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


def train_on_worker(config: dict[str, Any]) -> None:
    """What each worker process of a trial runs."""
    from finetune_trainer.worker_group import Assignment, Silent, job_of, this_worker, train_on

    environment = environment_from(os.environ)
    desk, number, worker = config["desk"], config["trial"]["number"], this_worker()
    assignment = Assignment(environment, job_of(environment, config), config, f"{FOLDER}/{number}", exports=False)
    if desk is not None:
        assignment = replace(assignment, adapted=measured_often)
    if desk is None or not worker.leads:
        train_on(worker, assignment, Silent())
        return
    reports = Reports(desk, number)
    reports.hear()
    train_on(worker, assignment, reports)


def measured_often(job: FineTuneJob, data: "Prepared") -> FineTuneJob:
    """The job with its validation loss measured MEASUREMENTS times. With early stopping, which counts measurements, it stays as it is."""
    from finetune_trainer.data.batches import plan_batches

    if job.spec.training.early_stopping is not None:
        return job
    steps = plan_batches(data.train, job.spec.training).total_steps
    return with_values(job, {}, {"checkpoint.everySteps": max(1, min(job.spec.checkpoint.every_steps, steps // MEASUREMENTS))})


class Reports:
    """A listener that passes on each validation loss but the last, which ends the trial anyway, and hears when the trial is ended early."""

    regroup_requested = False

    def __init__(self, desk: Any, number: int) -> None:  # noqa: ANN401 - Ray has no types
        self._desk, self._number, self._told = desk, number, 0
        self.stop_requested = False

    def hear(self) -> None:
        """Hear it from now on, in a thread of its own: no step waits for the desk."""
        threading.Thread(target=self._hear, name="hear", daemon=True).start()

    def _hear(self) -> None:
        import ray

        with suppress(Exception):  # the desk goes with the search
            while not self.stop_requested:
                self.stop_requested = bool(ray.get(self._desk.ended.remote(self._number)))
                time.sleep(LOOK_SECONDS)

    def post(self, progress: "WorkerProgress") -> None:
        """Take the newest state; it is not waited for that it is taken."""
        for metric in progress.metrics:
            step = metric.step or 0
            if metric.name == LOSS and self._told < step < progress.total_steps:
                self._told = step
                self._desk.put.remote(self._number, {"share": step / progress.total_steps, LOSS: metric.value})


def share_of(job: FineTuneJob, nodes: int) -> tuple[dict[str, Any], int]:
    """The workers that each trial gets, as spec.compute, and how many trials run at a time; `nodes` worker pods are there.

    One trial at a time has all workers. More have whole pods, as many each; where there are fewer pods than trials, equal parts of a pod's
    GPUs, or of its CPUs where it has none. The parts together are never more than there is, and Ray gives a trial its part whole or not at
    all, so trials do not wait for one another for ever.
    """
    compute, wanted = job.spec.compute, job.spec.search.parallel if job.spec.search else 1
    dumped: dict[str, Any] = compute.model_dump(mode="json", by_alias=True, exclude_none=True)
    if wanted == 1:
        return dumped, 1
    if wanted <= nodes:
        return {**dumped, "workers": {"min": nodes // wanted, "max": nodes // wanted}}, wanted
    gpus, cpus = gpus_of(compute), cpus_of(compute)
    parts = min(math.ceil(wanted / max(1, nodes)), gpus or cpus)
    kinds = [name for name, amount in dumped["resourcesPerWorker"].items() if name.endswith("/gpu") and int(amount) > 0]
    resources = {"cpu": max(1, cpus // parts), **({kinds[0]: gpus // parts} if kinds else {})}
    return {**dumped, "workers": {"min": 1, "max": 1}, "resourcesPerWorker": resources}, min(wanted, nodes * parts)
