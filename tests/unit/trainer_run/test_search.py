"""The search without Ray's processes: what Ray Tune is told and tells, and what is written down."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from tests.builders import raw_job

from finetune_api.reasons import Reason
from finetune_api.status import SearchSummary
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer import trial_run
from finetune_trainer.errors import JobError
from finetune_trainer.search import NextTrial, Search, scheduler_of
from finetune_trainer.search_space import Values
from finetune_trainer.sources import Location
from finetune_trainer.storage import Storage, storage_at
from finetune_trainer.suggestion import suggested
from finetune_trainer.trial_run import share_of
from finetune_trainer.trials import Trial, best_of

RATE = "training.learningRate"
CONFIG: dict[str, Any] = {"revision": "1", "data": "folder", "config": {"model": {}, "data": {"digest": "d"}}}


def a_job(*, compute: Mapping[str, Any] | None = None, **search: Any) -> FineTuneJob:
    parameters = {RATE: {"logUniform": [1e-5, 1e-1]}}
    given: dict[str, Any] = {"compute": dict(compute)} if compute else {}
    manifest = raw_job(search={"parameters": parameters, "trials": 4, **search}, training={"globalBatchSize": 64}, **given)
    return parse_job({key: value for key, value in manifest.items() if key != "status"})


@pytest.fixture
def own(tmp_path: Path) -> Storage:
    return storage_at(Location(LocalFileSystem(), str(tmp_path / "own"), f"file://{tmp_path}/own"))


class Told:
    """Whom the search tells how far it is."""

    def __init__(self, search: Search) -> None:
        self.summaries: list[SearchSummary] = []
        self._search = search

    def __call__(self) -> None:
        self.summaries.append(self._search.summary())


class Workers:
    """The desk's handle where the workers of a trial take some time to leave once they are asked to."""

    def __init__(self, looks: int = 0) -> None:
        self.asked: list[int] = []
        self._looks = looks
        self.end, self.left = SimpleNamespace(remote=self.asked.append), SimpleNamespace(remote=self._left)

    def _left(self, number: int) -> bool:
        self._looks -= 1
        return number in self.asked and self._looks <= 0


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of Ray's answer at once, here."""
    monkeypatch.setattr("ray.get", lambda answer: answer)
    monkeypatch.setattr(trial_run, "LOOK_SECONDS", 0.001)


def following(search: Search) -> tuple[NextTrial, Told]:
    told = Told(search)
    return NextTrial(search, 42, told, Workers()), told


def test_the_workers_of_a_trial_that_is_ended_early_have_left_before_anything_comes_after_it(
    own: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else Ray Tune might kill its driver while they leave, and Ray would take what they hold for taken, for ever."""
    search, workers = Search(a_job(trials=2), CONFIG, own), Workers(looks=5)
    tune = NextTrial(search, 42, lambda: None, workers)
    tune.suggest("a")
    tune.suggest("b")
    tune.on_trial_complete("a", {"value": 1.0})
    assert workers.asked == []
    tune.on_trial_complete("b", {"share": 0.25, "validation/loss": 9.0})
    assert (workers.asked, workers.left.remote(2)) == ([2], True)

    monkeypatch.setattr(trial_run, "LEAVE_SECONDS", 0.01)
    stuck = Workers(looks=10**9)
    trial_run.dismiss(stuck, 1)  # gives up, rather than hold up the search for ever
    assert stuck.asked == [1]


def test_trials_are_written_down_as_they_go_and_the_best_is_told(own: Storage) -> None:
    search = Search(a_job(), CONFIG, own)
    tune, told = following(search)
    assert (search.over, search.summary()) == (False, SearchSummary(trials=4))
    asked = [tune.suggest(f"ray-{count}") for count in range(4)]
    assert [each["number"] for each in asked if isinstance(each, dict)] == [1, 2, 3, 4]
    assert tune.suggest("ray-4") == "FINISHED"
    tune.on_trial_complete("ray-1", {"value": 2.0, "done": True})
    tune.on_trial_complete("ray-2", {"reason": "TrainingDiverged", "message": "the loss is nan", "done": True})
    tune.on_trial_complete("ray-3", {"share": 0.25, "validation/loss": 3.0, "done": True})
    tune.on_trial_complete("ray-0", {"value": 1.5, "done": True})

    again = Search(a_job(), CONFIG, own)
    assert [(trial.number, trial.state, trial.value) for trial in again.trials.all()] == [
        (1, "Completed", 1.5),
        (2, "Completed", 2.0),
        (3, "Failed", None),
        (4, "Pruned", None),
    ]
    assert again.trials.all()[3].course == ((0.25, 3.0),)
    assert again.over
    assert again.result() == search.result()
    assert again.result().best.number == 1
    last = told.summaries[-1]
    assert (last.trials, last.completed, last.failed, last.pruned) == (4, 2, 1, 1)
    assert last.best is not None
    assert (last.best.trial, last.best.value, last.best.parameters) == (1, 1.5, again.trials.all()[0].values)


def test_what_an_earlier_attempt_had_begun_is_run_again_first_and_what_had_ended_is_not(own: Storage) -> None:
    undisturbed = [suggested_values(number) for number in (1, 2, 3, 4)]
    tune, _ = following(Search(a_job(algorithm="random"), CONFIG, own))
    first, second = tune.suggest("a"), tune.suggest("b")
    tune.on_trial_complete("a", {"value": 1.0})
    tune, _ = following(Search(a_job(algorithm="random"), CONFIG, own))
    later = [tune.suggest(name) for name in "cde"]
    assert [later[0], first, second] == [second, first, second]
    assert [each["values"] for each in (first, *later) if isinstance(each, dict)] == undisturbed
    assert tune.suggest("f") == "FINISHED"


def test_a_trial_that_goes_on_from_a_checkpoint_has_each_loss_once(own: Storage) -> None:
    tune, _ = following(Search(a_job(), CONFIG, own))
    tune.suggest("a")
    for share, loss in ((0.1, 5.0), (0.2, 4.0), (0.3, 3.0), (0.2, 4.5), (0.3, 3.5)):
        tune.on_trial_result("a", {"share": share, "validation/loss": loss})
    assert Search(a_job(), CONFIG, own).trials.all()[0].course == ((0.1, 5.0), (0.2, 4.5), (0.3, 3.5))


def suggested_values(number: int) -> Values | None:
    plan = a_job(algorithm="random").spec.search
    assert plan is not None
    return suggested(plan, 42, number, [])


def test_a_search_that_was_cut_off_tries_the_same_as_one_that_was_not(own: Storage) -> None:
    """One trial at a time; the estimator is made anew after each, as after a killed head."""
    job = a_job(trials=12)
    whole, _ = following(Search(job, CONFIG, own.at("whole")))
    sequences: list[list[Any]] = [[], []]
    for count in range(12):
        cut, _ = following(Search(job, CONFIG, own.at("cut")))
        for sequence, tune in zip(sequences, (whole, cut), strict=True):
            trial = tune.suggest(str(count))
            assert isinstance(trial, dict)
            sequence.append(trial)
            tune.on_trial_complete(str(count), {"value": abs(trial["values"][RATE] - 1e-3)})
    assert sequences[0] == sequences[1]


def test_trials_of_another_search_are_not_taken_for_this_ones(own: Storage) -> None:
    tune, _ = following(Search(a_job(), CONFIG, own))
    tune.suggest("a")
    tune.on_trial_complete("a", {"value": 1.0})
    other = {**CONFIG, "config": {"model": {}, "data": {"digest": "another"}}}
    assert Search(a_job(), other, own).trials.all() == ()
    assert Search(a_job(parallel=2), CONFIG, own).summary().completed == 1
    (Path(own.root) / "trials" / "1" / "trial.json").write_text('{"number": 1')
    assert Search(a_job(), CONFIG, own).trials.all() == ()


def test_an_error_that_any_trial_would_meet_leaves_the_running_ones_to_be_run_again(own: Storage) -> None:
    """Ray Tune then ends the others, too, which is no pruning."""
    search = Search(a_job(parallel=2), CONFIG, own)
    tune, _ = following(search)
    tune.suggest("a"), tune.suggest("b")
    tune.on_trial_complete("a", None, error=True)
    tune.on_trial_complete("b", {"share": 0.25, "validation/loss": 1.0})
    assert [trial.state for trial in search.trials.all()] == ["Running", "Running"]
    assert tune.suggest("c") == "FINISHED"


def test_a_search_in_which_every_trial_fails_fails_for_the_first_ones_reason(own: Storage) -> None:
    search = Search(a_job(trials=2), CONFIG, own)
    tune, _ = following(search)
    for name, why in (("a", "step 3: the loss is nan"), ("b", "another")):
        tune.suggest(name)
        tune.on_trial_complete(name, {"reason": "TrainingDiverged", "message": why})
    assert search.over
    with pytest.raises(JobError, match=r"none of the 2 trials .* TrainingDiverged: step 3: the loss is nan") as failed:
        search.result()
    assert failed.value.reason == Reason.SEARCH_FAILED


def test_what_an_ended_trial_leaves_is_removed_but_for_the_best_ones(own: Storage) -> None:
    search = Search(a_job(), CONFIG, own)
    tune, _ = following(search)
    folder = Path(own.root) / "trials"
    left = []
    for number, value in enumerate((2.0, 3.0, 1.0), start=1):
        tune.suggest(str(number))
        (folder / str(number) / "checkpoints" / "step-1").mkdir(parents=True)
        (folder / str(number) / "baseline.json").write_text("{}")
        tune.on_trial_complete(str(number), {"value": value})
        left.append(sorted(path.parent.name for path in folder.glob("*/checkpoints")))
    assert left == [["1"], ["1"], ["3"]]
    assert sorted(path.name for path in (folder / "2").iterdir()) == ["trial.json"]


def test_the_best_of_equal_trials_is_the_first_and_one_without_a_value_is_none() -> None:
    trials = [Trial(1, {}, "Pruned"), Trial(2, {}, "Completed", 0.5), Trial(3, {}, "Completed", 0.5), Trial(4, {}, "Completed", 0.7)]
    assert best_of(trials, "min") == trials[1]
    assert best_of(trials, "max") == trials[3]
    assert best_of(trials[:1], "min") is None


# ASHA with a grace of a quarter and halving: rungs at 0.25 and 0.5 of the steps. Whoever is worse there than the median so far goes.


def decisions(reports: list[tuple[str, float, float]], trials: tuple[Trial, ...] = ()) -> list[str]:
    plan = a_job(pruning="asha").spec.search
    assert plan is not None
    asha = scheduler_of(plan, trials)
    known: dict[str, Any] = {}
    made = []
    for name, share, loss in reports:
        if name not in known:
            known[name] = SimpleNamespace(trial_id=name)
            asha.on_trial_add(None, known[name])
        made.append(asha.on_trial_result(None, known[name], {"share": share, "validation/loss": loss}))
    return made


def test_a_trial_goes_on_where_it_is_in_the_better_half_of_those_that_came_so_far() -> None:
    reports = [("a", 0.125, 9.0), ("a", 0.25, 4.0), ("b", 0.25, 5.0), ("c", 0.25, 3.0), ("d", 0.25, 4.5), ("c", 0.5, 2.0), ("a", 0.5, 2.5)]
    # b: 5 > 4. c: 3 < (4 + 5) / 2. d: 4.5 > median(3, 4, 5). a at the half: 2.5 > 2.
    assert decisions(reports) == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE", "STOP", "CONTINUE", "STOP"]


def test_earlier_attempts_losses_count() -> None:
    earlier = (Trial(1, {}, "Completed", 1.0, course=((0.25, 4.0),)), Trial(2, {}, "Running", course=((0.25, 1.0),)))
    assert decisions([("a", 0.25, 5.0), ("b", 0.25, 3.9)], earlier) == ["STOP", "CONTINUE"]


@pytest.mark.parametrize(
    ("workers", "resources", "parallel", "nodes", "share"),
    [
        (4, {"cpu": 2}, 1, 4, (4, {"cpu": 2}, 1)),
        (4, {"cpu": 2}, 2, 4, (2, {"cpu": 2}, 2)),
        (4, {"cpu": 2}, 3, 4, (1, {"cpu": 2}, 3)),
        (4, {"cpu": 2}, 4, 2, (1, {"cpu": 1}, 4)),  # two of four pods have come, and two trials share each
        (1, {"nvidia.com/gpu": 8, "cpu": 32}, 4, 1, (1, {"cpu": 8, "nvidia.com/gpu": 2}, 4)),
        (1, {"nvidia.com/gpu": 2, "cpu": 32}, 8, 1, (1, {"cpu": 16, "nvidia.com/gpu": 1}, 2)),  # a GPU is not shared
        (2, {"cpu": 1}, 8, 2, (1, {"cpu": 1}, 2)),
    ],
)
def test_parallel_trials_share_what_there_is(workers: int, resources: dict[str, int], parallel: int, nodes: int, share: Any) -> None:
    job = a_job(compute={"workers": {"min": 1, "max": workers}, "resourcesPerWorker": resources}, parallel=parallel)
    compute, at_a_time = share_of(job, nodes)
    assert (compute["workers"]["max"], compute["resourcesPerWorker"], at_a_time) == share
    per_pod = {name: amount * at_a_time * compute["workers"]["max"] for name, amount in compute["resourcesPerWorker"].items()}
    assert all(amount <= nodes * resources[name] for name, amount in per_pod.items())
