"""Ray Train: the loop on every worker, again from the newest checkpoint when workers were lost."""

import fcntl
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Compute, FineTuneJob, ModelSource
from finetune_trainer.environment import Environment, environment_from, own_folder
from finetune_trainer.errors import JobError
from finetune_trainer.failures import as_job_error, is_final
from finetune_trainer.ray_cluster import SCRATCH_VARIABLE, cpus_of, gpus_of, processes_of
from finetune_trainer.search_space import trial_job, with_values
from finetune_trainer.storage import storage_at

if TYPE_CHECKING:
    import torch

    from finetune_trainer.data.examples import Prepared
    from finetune_trainer.model_files import ModelFiles
    from finetune_trainer.progress import WorkerProgress
    from finetune_trainer.telling import Listener
    from finetune_trainer.worker import Worker

T = TypeVar("T")
MAX_FAILURES = 3
"""Times that lost workers are started again within an attempt."""
MAX_START_FAILURES = 20
"""Times that starting them may fail, GROUP_SECONDS each."""
NEVER = 1e12
COLLECTIVE_SECONDS = 7200
"""Longest time that workers wait for one another: one may be fetching or saving a large model. A dead peer is noticed at once."""


def fit(
    compute: Compute, config: dict[str, Any], name: str, scratch: Path, on_worker: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Run the loop, or `on_worker`, on the worker nodes, one process for each GPU, or one for each node without.

    An elastic job starts with as many nodes as there are, and goes on with those that are left when some are lost. That it grows again is
    the head's doing: Ray would end the workers without a checkpoint.

    `config` reaches every worker and Ray's own records: no secret may be in it. Raises what ended the training.
    """
    gpus, processes, workers = gpus_of(compute), processes_of(compute), compute.workers
    fewest, most = workers.min * processes, workers.max * processes
    resources: dict[str, float] = {"CPU": max(1, cpus_of(compute) // processes)}
    trainer = ray.train.torch.TorchTrainer(
        on_worker or _train_on_worker,
        train_loop_config=config,
        torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=gpus > 0,
            resources_per_worker=resources | ({"GPU": 1} if gpus else {}),
            elastic_resize_monitor_interval_s=NEVER,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(scratch / "train"),  # Ray keeps nothing there that is needed again: checkpoints are our own
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_START_FAILURES),
            callbacks=[EndOnFinalError()],
        ),
    )
    if fewest < most:
        _look_for_nodes()
    trainer.fit()


def _look_for_nodes() -> None:
    """Have Ray count the nodes now: an elastic start goes by a count that may be 20 seconds old, without those who have just joined."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as counting

    ray.get(counting.get_or_create_autoscaling_coordinator().get_reserved_resources.remote("finetune", recompute=True))


class EndOnFinalError(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Ends the run at an error that starting again cannot mend. Ray Train itself would try it again whatever it is."""

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first such error: an error of a callback ends the run."""
        for error in worker_exceptions.values():
            if is_final(error):
                raise as_job_error(error)


@dataclass(frozen=True)
class Silent:
    """A listener for the workers that do not report."""

    stop_requested: bool = False
    regroup_requested: bool = False

    def post(self, progress: "WorkerProgress") -> None:
        """Nobody is told."""


@dataclass(frozen=True)
class Assignment:
    """What a worker is to train, and where it finds things."""

    environment: Environment
    job: FineTuneJob
    config: dict[str, Any]
    """As `fit` has it: the model's revision, the folder of the prepared data, everything that the result follows from."""
    folder: str = ""
    """Where checkpoints and result go, below the job's own folder of output.storage."""
    exports: bool = True
    """Whether the result holds the weights as they are published."""
    adapted: Callable[[FineTuneJob, "Prepared"], FineTuneJob] = lambda job, _: job
    """What is changed of the job once its data is known."""


def _train_on_worker(config: dict[str, Any]) -> None:
    """What each worker process runs: find everything by the pod's environment, then the loop."""
    from finetune_trainer.progress import ProgressSender

    environment = environment_from(os.environ)
    worker = this_worker()
    sender = ProgressSender(environment.report_url, environment.token()) if worker.leads else None
    try:
        train_on(worker, Assignment(environment, job_of(environment, config), config), sender or Silent())
    finally:
        if sender is not None:
            sender.close()


def job_of(environment: Environment, config: Mapping[str, Any]) -> FineTuneJob:
    """The job that a group of workers works for: with the values that `config` gives a trial, or that the search has found.

    `config` has {"trial": {"number", "values", "compute"}} or {"values"}, or neither.
    """
    job, trial = environment.job(), config.get("trial")
    if trial is not None:
        return trial_job(job, trial["values"], trial["compute"])
    return with_values(job, config["values"]) if config.get("values") else job


def train_on(worker: "Worker", assignment: Assignment, listener: "Listener") -> None:
    """The loop for what is assigned. Every worker of the group calls it. Raises what the loop raises."""
    import torch

    from finetune_trainer.data.examples import Prepared, open_prepared
    from finetune_trainer.loop import Models, Task, train
    from finetune_trainer.model_files import ModelFiles, fetch_model
    from finetune_trainer.placement import placed
    from finetune_trainer.sources import resolve_storage
    from finetune_trainer.teacher import Place, taught

    job, environment, config = assignment.job, assignment.environment, assignment.config
    mounts = environment.mounts()
    output = storage_at(resolve_storage(job.spec.output, mounts))
    own = output.at(f".finetune/{job.metadata.uid}")
    cache = Path(os.environ[SCRATCH_VARIABLE]) / "cache"
    torch.set_num_threads(max(1, cpus_of(job.spec.compute) // processes_of(job.spec.compute)))

    def inputs() -> tuple[ModelFiles, Prepared]:
        with _alone_on_node(cache):
            files = fetch_model(job.spec.model, mounts, cache, weights=True, revision=config["revision"])
            return files, open_prepared(output.location(config["data"]), cache)

    files, data = _first_of_each_node(worker, inputs)
    job = assignment.adapted(job, data)
    place = Place(output, config["data"], data.digest, mounts, cache)
    revision = config["config"].get("teacher", {}).get("revision")
    model, warnings = placed(files, job, worker)
    pair = taught(job, model, revision, place, worker, partial(_first_of_each_node, worker))
    models = Models(pair.student, pair.teacher, pair.kept, warnings)
    task = Task(job, files.base, config["config"], own.at(assignment.folder) if assignment.folder else own, assignment.exports)
    train(task, models, data, worker, listener, group=uuid.uuid4().hex)


def fit_export(compute: Compute, config: dict[str, Any], name: str, scratch: Path) -> None:
    """Have the workers leave an earlier checkpoint as the result. `config` is that of `fit`, with {"result": a Result as JSON}."""
    fit(compute, config, name, scratch, on_worker=_export_on_worker)


def _export_on_worker(config: dict[str, Any]) -> None:
    """What each worker process of `fit_export` runs."""
    from finetune_trainer.loop import Task, export_earlier
    from finetune_trainer.model_files import fetch_model
    from finetune_trainer.placement import placed
    from finetune_trainer.result import Result
    from finetune_trainer.sources import resolve_storage

    environment, worker = environment_from(os.environ), this_worker()
    job = job_of(environment, config)
    mounts = environment.mounts()
    own = storage_at(resolve_storage(job.spec.output, mounts)).at(f".finetune/{job.metadata.uid}")
    cache = Path(os.environ[SCRATCH_VARIABLE]) / "cache"

    def inputs() -> "ModelFiles":
        with _alone_on_node(cache):
            return fetch_model(job.spec.model, mounts, cache, weights=True, revision=config["revision"])

    files = _first_of_each_node(worker, inputs)
    model, _ = placed(files, job, worker)
    result = Result(**config["result"], config=config["config"], kinds=job.spec.artifacts)
    export_earlier(Task(job, files.base, config["config"], own), model, result, worker)


def fit_answers(compute: Compute, config: dict[str, Any], name: str, scratch: Path) -> None:
    """Have candidates answer suites on the worker nodes, as `answering` has it. Raises what ended it.

    `config` is that of `fit`, with {"candidates": [Candidate.to_json(), ...], "stage": the stage that is running}; "folder" is where a
    trial's checkpoints are, "tasks" are the suites of lm-eval's, by their field. Candidates that are answered already are passed over, and
    a group that was lost is started again: it goes on with what is not answered.
    """
    fit(compute, config, name, scratch, on_worker=_answer_on_worker)


def _answer_on_worker(config: dict[str, Any]) -> None:
    """What each worker process of `fit_answers` runs."""
    from finetune_trainer.progress import ProgressSender

    environment = environment_from(os.environ)
    worker = this_worker()
    sender = ProgressSender(environment.report_url, environment.token()) if worker.leads else None
    try:
        answer_on(worker, Assignment(environment, job_of(environment, config), config, config.get("folder", "")), sender or Silent())
    finally:
        if sender is not None:
            sender.close()


def answer_on(worker: "Worker", assignment: Assignment, listener: "Listener") -> None:
    """The candidates of what is assigned, one after the other. Every worker of the group calls it."""
    import torch

    from finetune_trainer.answering import Candidate, Told, answer, outstanding
    from finetune_trainer.candidates import Candidates
    from finetune_trainer.evaluation.lm_eval import Candidate as Asked
    from finetune_trainer.evaluation.lm_eval import answer_tasks, read_results
    from finetune_trainer.model_files import ModelFiles, fetch_model
    from finetune_trainer.progress import WorkerProgress
    from finetune_trainer.sources import resolve_storage

    job, environment, config = assignment.job, assignment.environment, assignment.config
    mounts = environment.mounts()
    output = storage_at(resolve_storage(job.spec.output, mounts))
    own = output.at(own_folder(job))
    cache = Path(os.environ[SCRATCH_VARIABLE]) / "cache"
    torch.set_num_threads(max(1, cpus_of(job.spec.compute) // processes_of(job.spec.compute)))
    group, warnings = uuid.uuid4().hex, list[str]()

    def fetch(source: ModelSource, revision: str | None) -> ModelFiles:
        def here() -> ModelFiles:
            with _alone_on_node(cache):
                return fetch_model(source, mounts, cache, weights=True, revision=revision)

        return _first_of_each_node(worker, here)

    def tell(told: Told) -> None:
        warnings.extend([told.warning] if told.warning else [])
        progress = WorkerProgress(group=group, processes=worker.world, stage=config["stage"], message=str(told))
        listener.post(progress.model_copy(update={"answered": told.answered, "cases": told.cases, "warnings": tuple(warnings)}))

    trained = own.at(assignment.folder) if assignment.folder else own
    candidates = Candidates(job, config["revision"], config["config"], trained, fetch, worker, output)
    for value in config["candidates"]:
        whole = Candidate.of_json(value)
        left = outstanding(own, whole) if worker.leads else None
        if worker.agree(int(left is not None)):
            answer(candidates.asking(whole), whole, own, worker, tell)
        for where, name in ({} if whole.whole else config.get("tasks", {})).items():
            suite = next(suite for suite in job.spec.evaluation.suites if suite.name == name)
            known = worker.leads and read_results(own, whole.name, suite) is not None
            if not worker.agree(int(known)):
                tell(Told(whole.name, name, 0, 0))
                asking = candidates.asking(whole)
                voice = asking.speaker.voice
                answer_tasks(suite, whole.name, Asked(asking.speaker, voice.tokenizer, voice.context, worker), where, own)
                for warning in asking.speaker.settle(worker):
                    tell(Told(whole.name, name, 0, 0, warning))


@contextmanager
def _alone_on_node(cache: Path) -> Iterator[None]:
    """One process of a machine at a time: several groups, each of another trial, may fill its cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _first_of_each_node(worker: "Worker", call: Callable[[], T]) -> T:
    """The call's result: one process of each node makes it first, and fills the cache that the others then find."""
    first = ray.train.get_context().get_local_rank() == 0
    early = call() if first else None
    worker.sum(0.0)
    return early if early is not None else call()


def this_worker() -> "Worker":
    """The process as a part of Ray's worker group."""
    import torch.distributed

    from finetune_trainer.worker import Worker

    context = ray.train.get_context()

    def all_reduce(tensor: "torch.Tensor") -> None:
        try:
            torch.distributed.all_reduce(tensor)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise JobError(Reason.WORKERS_LOST, f"worker {context.get_world_rank()} lost the connection to another: {error}") from error

    world = context.get_world_size()
    alone: Callable[[torch.Tensor], None] = lambda _: None  # noqa: E731 - a one-process group needs no connection
    return Worker(
        rank=context.get_world_rank(),
        world=world,
        device=ray.train.torch.get_device(),
        all_reduce=all_reduce if world > 1 else alone,
        preempted=lambda: ray.train.get_preemption_info() is not None,
    )
