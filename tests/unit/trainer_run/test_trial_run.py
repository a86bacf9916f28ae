"""One trial, in this process: trained in its own folder, gone on with, measured, and failed."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.builders import raw_job
from tests.in_process import run_job
from tests.tiny_llama import make_tiny_llama, write_questions

from finetune_api.reasons import Reason
from finetune_api.status import Metric
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer import run, worker_group
from finetune_trainer.attempt import Attempt, Preparation
from finetune_trainer.environment import Environment
from finetune_trainer.errors import JobError
from finetune_trainer.progress import WorkerProgress
from finetune_trainer.result import Result, read_result
from finetune_trainer.search_space import Values
from finetune_trainer.storage import Storage
from finetune_trainer.trial_run import Reports, Searching, goal_value, run_trial
from finetune_trainer.trials import ReportDesk, Trial, Trials

RATE, RANK = "training.learningRate", "method.lora.rank"
VALUES = {RATE: 0.01, RANK: 2}


class Bench:
    """A job whose data is prepared."""

    def __init__(self, attempt: Attempt, preparation: Preparation, patch: pytest.MonkeyPatch) -> None:
        self.job, self.own, self.patch = attempt.job, attempt.own, patch
        self.config = preparation.for_workers

    def run(self, number: int, values: Values, **given: Any) -> dict[str, Any]:
        compute = self.job.spec.compute.model_dump(mode="json", by_alias=True)
        return run_trial(number, values, Searching(self.config, compute, "attempt-1", **given))

    def folder(self, number: int) -> Path:
        return Path(self.own.root) / "trials" / str(number)


class Done(Exception):  # noqa: N818 - no error
    """The test has seen what it wanted."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    volumes = tmp_path_factory.mktemp("volumes")
    claim = volumes / "claims" / "data"
    make_tiny_llama(claim / "model")
    write_questions(claim / "train.jsonl", 24)
    write_questions(claim / "validation.jsonl", 6, start=100)
    return volumes


def a_job(name: str, **spec: Any) -> FineTuneJob:
    search = {"parameters": {RATE: {"logUniform": [1e-5, 1]}, RANK: {"choice": [2, 4]}}, "epochs": 2, **spec.pop("search", {})}
    manifest = raw_job(
        uid=name,
        model={"source": "pvc://data/model"},
        data={name: {"source": f"pvc://data/{name}.jsonl"} for name in ("train", "validation")},
        training={"epochs": 8, "globalBatchSize": 3, "maxSequenceLength": 64, "packing": False, "precision": "float32"},
        compute={"workers": {"min": 1, "max": 1}},
        output={"storage": f"pvc://{name}/job"},
        search=search,
        **spec,
    )
    return parse_job({key: value for key, value in manifest.items() if key != "status"})


def on_bench(inputs: Path, monkeypatch: pytest.MonkeyPatch, job: FineTuneJob, see: Callable[[Bench], None]) -> None:
    """Prepare the job's data, then do as the test says in place of its training."""
    (inputs / "claims" / job.spec.output.storage.split("/")[2]).mkdir()

    def train(attempt: Attempt, preparation: Preparation, *_: Any) -> Result:
        with pytest.MonkeyPatch.context() as inner:  # undone before what the job itself is run with
            see(Bench(attempt, preparation, inner))
        raise Done

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", train)
        patch.setattr("finetune_trainer.search_stage.search", lambda attempt, preparation, *_: (preparation, ()))
        with pytest.raises(Done):
            run_job(job, inputs, patch)


def test_a_trial_leaves_its_figures_in_its_folder_and_is_not_trained_twice(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def see(bench: Bench) -> None:
        outcome = bench.run(3, VALUES)
        files = {path.relative_to(bench.folder(3)).as_posix() for path in bench.folder(3).rglob("*") if path.is_file()}
        assert {"result/manifest.json", "checkpoints/step-00000016/manifest.json", "baseline.json"} <= files
        assert not any(name.endswith(".safetensors") for name in files if name.startswith("result"))
        bench.patch.setattr(worker_group, "fit", None)
        assert bench.run(3, VALUES) == outcome
        assert 0 < outcome["value"] < 6

        trials = Trials(bench.own, "search")
        trials.keep(Trial(4, {}))
        trials.keep(Trial(5, {}))
        (bench.folder(5) / "checkpoints").mkdir()
        trials.clear(5)
        assert {path.name for path in bench.folder(5).iterdir()} == {"trial.json"}

    on_bench(inputs, monkeypatch, a_job("once"), see)


class Leaving:
    """A listener that asks the workers of the first group to leave after their first step."""

    groups = 0
    regroup_requested = False

    def __init__(self) -> None:
        type(self).groups += 1
        self.stop_requested = type(self).groups == 1

    def post(self, progress: WorkerProgress) -> None:
        """Nobody is told."""


def test_a_trial_whose_workers_are_taken_away_goes_on_to_the_same_end(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def see(bench: Bench) -> None:
        undisturbed = bench.run(1, VALUES)
        bench.patch.setattr(worker_group, "Silent", Leaving)
        disturbed = bench.run(2, VALUES)
        assert Leaving.groups == 2
        assert disturbed["value"] == pytest.approx(undisturbed["value"], abs=1e-6)
        assert bench.run(3, {RATE: 1e-5, RANK: 2})["value"] > undisturbed["value"]

    on_bench(inputs, monkeypatch, a_job("again"), see)


def test_the_validation_losses_on_the_way_are_reported_eight_times_in_all(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 examples by 3 are 8 steps an epoch, 16 in all: every second is measured, and the last is the end."""
    desk = ReportDesk()

    class Handle:
        class put:  # noqa: N801 - as an actor's method is called
            remote = staticmethod(desk.put)

    def see(bench: Bench) -> None:
        bench.run(1, VALUES, desk=Handle)
        reports = desk.take(1)
        assert [report["share"] for report in reports] == [step / 16 for step in range(2, 16, 2)]
        assert reports[-1]["validation/loss"] < reports[0]["validation/loss"]
        assert desk.take(1) == []

    on_bench(inputs, monkeypatch, a_job("course"), see)


def test_a_loss_is_reported_once_and_the_last_never() -> None:
    taken: list[tuple[int, dict[str, float]]] = []

    class Handle:
        class put:  # noqa: N801 - as an actor's method is called
            remote = staticmethod(lambda number, report: taken.append((number, report)))

    reports = Reports(Handle, 7)
    for step, loss in ((2, 3.0), (2, 3.0), (4, 2.5), (8, 2.0)):
        metrics = (Metric(name="train/loss", value=9.0, step=step + 1), Metric(name="validation/loss", value=loss, step=step))
        reports.post(WorkerProgress(group="g", total_steps=8, metrics=metrics))
    assert taken == [(7, {"share": 0.25, "validation/loss": 3.0}), (7, {"share": 0.5, "validation/loss": 2.5})]


def failing(reason: Reason) -> Callable[..., None]:
    def fit(*_: Any) -> None:
        raise RuntimeError("a worker failed") from JobError(reason, "step 3: the loss is nan")

    return fit


@pytest.mark.parametrize("reason", [Reason.TRAINING_DIVERGED, Reason.GPU_OUT_OF_MEMORY, Reason.OUT_OF_MEMORY])
def test_a_trial_that_fails_of_its_values_says_why(inputs: Path, monkeypatch: pytest.MonkeyPatch, reason: Reason) -> None:
    def see(bench: Bench) -> None:
        bench.patch.setattr(worker_group, "fit", failing(reason))
        assert bench.run(1, VALUES) == {"reason": str(reason), "message": "step 3: the loss is nan"}

    on_bench(inputs, monkeypatch, a_job(f"own-{reason.lower()}"), see)


@pytest.mark.parametrize("reason", [Reason.WORKERS_LOST, Reason.STORAGE_FULL, Reason.TEACHER_UNAVAILABLE])
def test_what_would_befall_any_trial_is_raised(inputs: Path, monkeypatch: pytest.MonkeyPatch, reason: Reason) -> None:
    def see(bench: Bench) -> None:
        bench.patch.setattr(worker_group, "fit", failing(reason))
        with pytest.raises(RuntimeError, match="a worker failed"):
            bench.run(1, VALUES)

    on_bench(inputs, monkeypatch, a_job(f"any-{reason.lower()}"), see)


def test_values_that_do_not_go_together_are_a_failed_trial(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def see(bench: Bench) -> None:
        outcome = bench.run(1, {RANK: 100_000})
        assert outcome["reason"] == "InvalidSpec"
        assert "method.lora.rank 100000 do not go together" in outcome["message"]

    on_bench(inputs, monkeypatch, a_job("together"), see)


def test_a_suites_metric_is_measured_by_whoever_can(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suites = {"suites": [{"name": "task", "source": "validation", "metrics": ["exactMatch"]}]}
    job = a_job("suite", evaluation=suites, search={"goal": {"metric": "task/exactMatch", "mode": "max"}})
    asked: list[tuple[int, str]] = []

    def measure(trial: FineTuneJob, folder: Storage) -> float:
        result = Path(folder.root) / "result" / "manifest.json"
        asked.append((trial.spec.method.lora.rank if trial.spec.method.lora else 0, str(result.parent.parent.name)))
        assert result.is_file()
        return 0.25

    def see(bench: Bench) -> None:
        assert bench.run(6, VALUES, measure=measure) == {"value": 0.25}
        assert asked == [(2, "6")]
        failed = bench.run(6, VALUES)
        assert failed == {"reason": "EvaluationFailed", "message": "search.goal.metric: task/exactMatch was not measured"}

    on_bench(inputs, monkeypatch, job, see)


@pytest.mark.parametrize(("metric", "value"), [("validation/loss", 2.0), ("validation/perplexity", 7.38905609893065)])
def test_what_the_loop_has_measured_is_the_goal(metric: str, value: float, tmp_path: Path) -> None:
    job = a_job("goal", search={"goal": {"metric": metric, "mode": "min"}})
    result = Result(4, 100, {"validation": 3.0}, {"validation": 2.0}, {})
    assert goal_value(job, job, result, None, None) == pytest.approx(value)  # type: ignore[arg-type]
    lost = Result(4, 100, {"validation": 3.0}, {"validation": 800.0}, {})
    if metric.endswith("perplexity"):
        with pytest.raises(JobError, match="validation/perplexity is None"):
            goal_value(job, job, lost, None, None)  # type: ignore[arg-type]


def test_a_result_without_weights_is_whole(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def see(bench: Bench) -> None:
        bench.run(1, VALUES)
        manifest = bench.own.read_json("trials/1/result/manifest.json")
        result = read_result(bench.own.at("trials/1"), manifest["config"])
        assert result is not None
        assert (result.kinds, result.steps) == ((), 16)

    on_bench(inputs, monkeypatch, a_job("whole"), see)


def test_workers_know_their_job_by_what_they_are_told(tmp_path: Path) -> None:
    """A trial's values and share; after the search the best trial's values, with all workers; the job's own without one."""
    job = a_job("told")
    (tmp_path / "job.json").write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    environment = Environment(tmp_path / "job.json", 1, tmp_path / "token", "127.0.0.1", 6379, 8000, tmp_path, local=True)
    share = {"workers": {"min": 1, "max": 1}, "resourcesPerWorker": {"cpu": 2}}
    trial = worker_group.job_of(environment, {"trial": {"number": 3, "values": {RATE: 0.5}, "compute": share}}).spec
    best = worker_group.job_of(environment, {"values": {RATE: 0.25}}).spec
    assert (trial.training.learning_rate, trial.training.epochs, trial.compute.resources_per_worker) == (0.5, 2, {"cpu": 2})
    assert (best.training.learning_rate, best.training.epochs, best.compute) == (0.25, 8, job.spec.compute)
    assert worker_group.job_of(environment, {}) == job


def test_two_groups_on_a_machine_fill_its_cache_one_after_the_other(tmp_path: Path) -> None:
    inside = threading.Event()
    order: list[str] = []

    def second() -> None:
        inside.wait()
        with worker_group._alone_on_node(tmp_path / "cache"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with worker_group._alone_on_node(tmp_path / "cache"):
        inside.set()
        thread.join(timeout=0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
