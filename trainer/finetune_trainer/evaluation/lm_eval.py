"""Tasks of EleutherAI's lm-evaluation-harness as metrics of a suite, where lm-eval is installed (the extra `lm-eval`).

    answers/<candidate>/<suite>.tasks.json    what a candidate reaches, in the job's own folder

A task's value is that of its first metric that rises as a model gets better. Its data comes from the hub, as the harness's task says. No
code does: tasks that run what a model writes are refused (see harness_code.py), metrics that are programs on the hub are not fetched.
"""

import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from finetune_api.evaluation import Suite
from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.harness_code import program_in
from finetune_trainer.evaluation.intervals import intervals_of, mean_of
from finetune_trainer.evaluation.scores import SHARE, Measured
from finetune_trainer.sources import explained
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune_trainer.evaluation.harness_model import Asked

SEED = 1234
"""Of the examples that are shown before a question: the harness's own default."""
_EXACT = 1e-9


@dataclass(frozen=True)
class TaskResult:
    """What a model reaches in a task, or in a group of tasks."""

    task: str
    metric: str
    """The harness's name: acc."""
    value: float
    per_case: tuple[float | None, ...] = ()
    """Of each example, of a group's tasks one after the other; empty where the value is not their mean."""

    def to_json(self) -> dict[str, Any]:
        """As `of_json` takes it."""
        return asdict(self)

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Self:
        """The result that `to_json` has made. Raises TypeError or KeyError where it is none."""
        return cls(**{**value, "per_case": tuple(value["per_case"])})


def check_tasks(suite: Suite, where: str, folder: Path | None = None) -> None:
    """Find out, before a GPU is asked for, whether the suite's tasks can be run here; their data is fetched.

    `where` is the suite's field in the spec; `folder` holds tasks to use instead of the harness's own.
    Raises JobError (InvalidSpec, DatasetNotFound, AuthenticationFailed, StorageUnavailable).
    """
    with _without_foreign_code(where):
        for name, loaded in _loaded(suite, where, folder).items():
            _metric(name, loaded, where)


@dataclass(frozen=True)
class Candidate:
    """A model that is asked."""

    asked: "Asked"
    """What computes: generation.Speaker."""
    tokenizer: "PreTrainedTokenizerBase"
    context: int | None
    """Tokens that a prompt and its answer may have together; None where the model does not say."""
    worker: Worker = field(default_factory=Worker)


def task_results(suite: Suite, candidate: Candidate, where: str, folder: Path | None = None) -> tuple[TaskResult, ...]:
    """What the model reaches in each of the suite's tasks, in their order. Every worker calls it and gets the same.

    Raises JobError as check_tasks does, EvaluationFailed where the harness fails, and what computing raises.
    """
    _check_installed(where)
    from lm_eval.evaluator import evaluate

    from finetune_trainer.evaluation.harness_model import HarnessModel

    with _without_foreign_code(where):
        loaded, found = _loaded(suite, where, folder), []
        model = HarnessModel(candidate.asked, candidate.tokenizer, candidate.context, candidate.worker)
        for name, tasks in loaded.items():
            metric = _metric(name, tasks, where)
            for task in tasks["tasks"].values():
                if task.get_config("num_fewshot") != 0:  # a task that says 0 cannot be shown any
                    task.set_config(key="num_fewshot", value=suite.lm_eval.few_shot if suite.lm_eval else 0)
                task.set_fewshot_seed(seed=SEED)
            try:
                made = evaluate(model, tasks, limit=suite.limit, bootstrap_iters=0, log_samples=True)
            except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
                raise JobError(Reason.EVALUATION_FAILED, f"{where}.lmEval: the task {name}: {_first_line(error)}") from error
            found.append(_result(name, metric, made))
    return tuple(found)


def answer_tasks(suite: Suite, name: str, candidate: Candidate, where: str, storage: Storage, folder: Path | None = None) -> None:
    """Leave a candidate's results in the job's own folder, unless they are there. Every worker calls it. Raises JobError as task_results.

    `name` is the candidate's, as in its answers.
    """
    worker = candidate.worker
    if worker.agree(int(worker.leads and read_results(storage, name, suite) is not None)):
        return
    results = task_results(suite, candidate, where, folder)
    if worker.leads:
        storage.write_json(results_file(name, suite), {"asked": _asked(suite), "results": [each.to_json() for each in results]})
    worker.sum(0.0)


def read_results(storage: Storage, name: str, suite: Suite) -> tuple[TaskResult, ...] | None:
    """What `answer_tasks` has left; None where it has not, or the suite was another one. Raises JobError."""
    found = storage.read_json(results_file(name, suite))
    try:
        return tuple(TaskResult.of_json(each) for each in found["results"]) if found["asked"] == _asked(suite) else None  # type: ignore[index]
    except (TypeError, KeyError):
        return None


def results_file(name: str, suite: Suite) -> str:
    """Name of a candidate's results."""
    return f"answers/{name}/{suite.name}.tasks.json"


def _asked(suite: Suite) -> dict[str, Any]:
    """What the results follow from, but for the model."""
    return {"lmEval": suite.lm_eval.model_dump(mode="json", by_alias=True) if suite.lm_eval else None, "limit": suite.limit}


def measured_tasks(suite: Suite, results: Sequence[TaskResult], confidence: float) -> tuple[Measured, ...]:
    """The results as figures of a candidate, with their intervals where their values are means of their examples'. Pure."""
    estimates = [mean_of(each.per_case, _limits(each)) for each in results]
    return tuple(
        Measured(
            f"{suite.name}/{each.task}",
            each.value,
            interval.low if each.per_case else None,
            interval.high if each.per_case else None,
            each.per_case,
            sum(value is not None for value in each.per_case),
            tuple(f"{number:06}" for number in range(len(each.per_case))),
            estimate if each.per_case else None,
        )
        for each, estimate, interval in zip(results, estimates, intervals_of(estimates, confidence), strict=True)
    )


def _limits(result: TaskResult) -> tuple[float, float] | None:
    return SHARE if all(value is None or 0 <= value <= 1 for value in result.per_case) else None


def _check_installed(where: str) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise JobError(
            Reason.INVALID_SPEC,
            f"{where}.lmEval: lm-eval is not installed in the trainer: build its image with --build-arg LM_EVAL=1 "
            "(locally: pip install 'finetune-operator[lm-eval]'), or leave the suite out",
        )


def _loaded(suite: Suite, where: str, folder: Path | None) -> dict[str, Any]:
    """The tasks behind each name that the suite has, with their data. Raises JobError."""
    _check_installed(where)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=folder is None)
    names = suite.lm_eval.tasks if suite.lm_eval else ()
    for name in names:
        if name not in (*manager.all_subtasks, *manager.all_groups):
            several = " is a tag of several tasks: name them, or a group" if name in manager.all_tags else " is no task that lm-eval knows"
            raise JobError(Reason.INVALID_SPEC, f"{where}.lmEval.tasks: {name}{several}")
    return {name: _fetched(manager, name, where) for name in names}


def _fetched(manager: Any, name: str, where: str) -> Any:  # noqa: ANN401 - lm-eval has no types
    try:
        loaded = manager.load([name])
    except JobError:
        raise
    except Exception as error:  # of the hub, of a task's own code, of a package that it needs
        problem = explained(error, f"the data of {name}", Reason.DATASET_NOT_FOUND)
        reason = Reason.INVALID_SPEC if problem.reason == Reason.INTERNAL_ERROR else problem.reason
        raise JobError(reason, f"{where}.lmEval.tasks: {problem.message}") from error
    if unsafe := [each for each, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False) or program_in(task)]:
        raise JobError(Reason.INVALID_SPEC, f"{where}.lmEval.tasks: {unsafe[0]} runs what the model writes, which is not done here")
    return loaded


def _metric(name: str, loaded: Any, where: str) -> str:  # noqa: ANN401 - lm-eval has no types
    """The first metric of a task, or of a group's first task, that rises as a model gets better. Raises JobError (InvalidSpec)."""
    rising = next(iter(loaded["tasks"].values())).higher_is_better()
    for metric, better in rising.items():
        if better:
            return str(metric)
    what = f"{name} has only metrics that fall as a model gets better ({', '.join(rising)}), which gates would take for the opposite"
    raise JobError(Reason.INVALID_SPEC, f"{where}.lmEval.tasks: {what}: take the metric perplexity of a suite with data of its own")


def _result(name: str, metric: str, made: Mapping[str, Any]) -> TaskResult:
    """The harness's figure, with the examples' where it is their mean."""
    figures = {**made["results"], **made.get("groups", {})}[name]
    key = next((key for key in figures if key.partition(",")[0] == metric), None)
    value = float(figures[key]) if key is not None else math.nan
    if key is None or not math.isfinite(value):
        raise JobError(Reason.EVALUATION_FAILED, f"the task {name} gives no {metric}")
    kept = [sample for task in _leaves(name, made) for sample in made["samples"][task] if sample["filter"] == key.partition(",")[2]]
    cases = tuple(_number(sample.get(metric)) for sample in kept)
    there = [case for case in cases if case is not None]
    is_mean = bool(there) and abs(math.fsum(there) / len(there) - value) <= _EXACT * max(1.0, abs(value))
    return TaskResult(name, metric, value, cases if is_mean else ())


def _leaves(name: str, made: Mapping[str, Any]) -> list[str]:
    """The tasks of a group, however deep, in their order; of a task itself."""
    below = made.get("group_subtasks", {}).get(name) or ()
    return [leaf for each in below for leaf in _leaves(each, made)] if below else [name]


def _number(value: Any) -> float | None:  # noqa: ANN401 - whatever a metric keeps of an example
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _without_foreign_code(where: str) -> Iterator[None]:
    """No program of the hub's is fetched: the library `evaluate` would run a metric from there. Raises JobError (InvalidSpec) for one."""
    _check_installed(where)
    import evaluate

    asked_for: list[str] = []

    def refuse(name: str, *_: Any, **__: Any) -> None:  # noqa: ANN401 - any arguments
        asked_for.append(name)
        raise RuntimeError(f"{name} is not fetched")  # which the harness may catch, and go on without

    load, evaluate.load = evaluate.load, refuse
    try:
        yield
    except JobError as error:
        raise (_foreign(asked_for[0], where) if asked_for else error) from error
    finally:
        evaluate.load = load
    if asked_for:
        raise _foreign(asked_for[0], where)


def _foreign(name: str, where: str) -> JobError:
    return JobError(Reason.INVALID_SPEC, f"{where}.lmEval.tasks: the metric {name} is a program on the hub, which is not run")
