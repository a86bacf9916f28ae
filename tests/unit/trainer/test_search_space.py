"""The space of a search, and the jobs of its points."""

import json
from typing import Any

import pytest
from tests.builders import raw_job

from finetune_api.reasons import Reason
from finetune_api.search import SearchPlan
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.errors import JobError
from finetune_trainer.loop import judged_on_the_way
from finetune_trainer.search_space import (
    Dimension,
    check_comparable,
    config_of,
    roomiest,
    space_of,
    told,
    trial_job,
    trials_of,
    with_values,
)


def plan(**given: Any) -> SearchPlan:
    return SearchPlan.model_validate_json(json.dumps({"parameters": {"training.learningRate": {"logUniform": [1e-4, 1e-2]}}, **given}))


def a_job(**spec: Any) -> FineTuneJob:
    parameters = {"training.learningRate": {"logUniform": [1e-4, 1e-2]}, "method.lora.rank": {"choice": [8, 16]}}
    manifest = raw_job(search={"parameters": parameters, "epochs": 1}, training={"epochs": 4}, **spec)
    return parse_job({key: value for key, value in manifest.items() if key != "status"})


@pytest.mark.parametrize(
    ("dimension", "share", "value"),
    [
        (Dimension("a", low=2, high=10), 0.25, 4.0),
        (Dimension("a", low=1e-4, high=1e-2, logarithmic=True), 0.0, 1e-4),
        (Dimension("a", low=1e-4, high=1e-2, logarithmic=True), 0.5, 1e-3),
        (Dimension("a", low=2, high=5, whole=True), 0.0, 2),
        (Dimension("a", low=2, high=5, whole=True), 0.2499, 2),
        (Dimension("a", low=2, high=5, whole=True), 0.25, 3),
        (Dimension("a", low=2, high=5, whole=True), 0.9999, 5),
        # From 1 to 8 by logarithms a third of the probability each has 1, 2 or 3, 4 to 7.
        (Dimension("a", low=1, high=7, logarithmic=True, whole=True), 0.33, 1),
        (Dimension("a", low=1, high=7, logarithmic=True, whole=True), 0.34, 2),
        (Dimension("a", low=1, high=7, logarithmic=True, whole=True), 0.67, 4),
        (Dimension("a", choices=("none", "dora", "rslora")), 0.34, "dora"),
    ],
)
def test_a_value_is_where_its_share_of_the_probability_is(dimension: Dimension, share: float, value: object) -> None:
    found = dimension.at(share)
    assert found == (pytest.approx(value) if isinstance(value, float) else value)
    assert type(found) is type(value)


def test_a_field_of_whole_numbers_gets_whole_numbers_and_values_that_stand_twice_count_once() -> None:
    parameters = {"method.lora.rank": {"uniform": [4, 6]}, "training.epochs": {"choice": [3, 1, 3]}}
    space = space_of(plan(parameters=parameters))
    assert [dimension.path for dimension in space.dimensions] == ["method.lora.rank", "training.epochs"]
    assert space.size == 6
    points = [{"method.lora.rank": rank, "training.epochs": epochs} for rank in (4, 5, 6) for epochs in (3, 1)]
    assert list(space.grid()) == points


def test_there_are_no_more_trials_than_points() -> None:
    assert trials_of(plan(trials=100)) == 100
    assert trials_of(plan(trials=100, parameters={"method.lora.rank": {"choice": [4, 8]}, "training.epochs": {"choice": [1, 2, 3]}})) == 6
    assert trials_of(plan(trials=2, algorithm="grid", parameters={"method.lora.rank": {"choice": [4, 8, 16]}})) == 2


def test_a_trial_has_its_values_and_the_searchs_epochs_and_is_no_search_itself() -> None:
    job = a_job()
    trial = trial_job(job, {"training.learningRate": 5e-4, "method.lora.rank": 8})
    assert (trial.spec.training.learning_rate, trial.spec.training.epochs) == (5e-4, 1)
    assert trial.spec.method.lora is not None
    assert trial.spec.method.lora.rank == 8
    assert (trial.spec.search, trial.spec.checkpoint.keep) == (None, 1)
    assert trial.metadata == job.metadata
    assert (trial.spec.data, trial.spec.model, trial.spec.compute) == (job.spec.data, job.spec.model, job.spec.compute)


def test_a_trial_measures_no_earlier_checkpoint() -> None:
    """Of a job that is compared with its earlier ones, or may publish one, the test loss is measured of each; a trial needs none of it."""
    data = {"train": {"source": "pvc://data/train.jsonl"}, "test": {"source": "pvc://data/test.jsonl"}}
    gates = [{"metric": "test/loss", "atMost": 2.0}]
    for evaluation in ({"compareWith": ["baseline", "checkpoints"]}, {"gates": gates, "onGateFailure": "tryEarlierCheckpoint"}):
        job = a_job(data=data, evaluation=evaluation)
        assert judged_on_the_way(job.spec) == ("validation", "test")
        trial = trial_job(job, {"training.learningRate": 5e-4})
        assert judged_on_the_way(trial.spec) == ("validation",)
        assert (trial.spec.evaluation.compare_with, trial.spec.evaluation.gates) == (("baseline",), job.spec.evaluation.gates)


def test_the_best_values_are_trained_with_for_the_jobs_own_epochs() -> None:
    job = a_job()
    best = with_values(job, {"training.learningRate": 0.004})
    assert best.spec.training == job.spec.training.model_copy(update={"learning_rate": 0.004})
    assert (best.spec.search, best.spec.checkpoint) == (job.spec.search, job.spec.checkpoint)


def test_a_trial_gets_its_share_of_the_workers() -> None:
    trial = trial_job(a_job(), {"method.lora.rank": 8}, {"workers": {"min": 1, "max": 1}, "resourcesPerWorker": {"cpu": 2}})
    assert (trial.spec.compute.workers.min, trial.spec.compute.workers.max) == (1, 1)
    assert trial.spec.compute.resources_per_worker == {"cpu": 2}


def test_values_that_do_not_go_together_are_refused_with_the_fields_that_are_at_fault() -> None:
    with pytest.raises(JobError, match=r"method.lora.rank 100000 do not go together: spec.method.lora.rank: ") as refused:
        with_values(a_job(), {"method.lora.rank": 100_000})
    assert refused.value.reason == Reason.INVALID_SPEC


def test_what_could_not_be_trained_on_all_workers_is_not_tried_on_a_share_of_them() -> None:
    """One sequence a step cannot be shared by the two workers of the job, though one worker could take it."""
    with pytest.raises(JobError, match=r"training.globalBatchSize 1 .*compute.workers.max"):
        trial_job(a_job(), {"training.globalBatchSize": 1}, {"workers": {"min": 1, "max": 1}})


def test_the_configuration_follows_the_values_and_keeps_what_trials_share() -> None:
    job = a_job()
    base = {"model": {"source": "m", "revision": "1"}, "data": {"digest": "d"}, "method": {}, "objective": {}, "training": {}}
    config = config_of(base, trial_job(job, {"training.learningRate": 5e-4}))
    assert (config["model"], config["data"]) == (base["model"], base["data"])
    assert config["training"]["learningRate"] == 5e-4
    assert config["method"] == {"lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targetModules": ["all-linear"], "variant": "none"}}


def test_values_are_told_in_few_digits() -> None:
    assert told({"training.learningRate": 0.000123456, "method.lora.rank": 8}) == "method.lora.rank 8, training.learningRate 0.0001235"


def test_examples_leave_room_for_the_most_virtual_tokens_that_are_tried() -> None:
    path = "method.promptTuning.numVirtualTokens"
    manifest = raw_job(method={"promptTuning": {}}, search={"parameters": {path: {"choice": [10, 50, 30]}}})
    job = parse_job({key: value for key, value in manifest.items() if key != "status"})
    found = roomiest(job).spec.method.prompt_tuning
    assert found is not None
    assert found.num_virtual_tokens == 50
    assert roomiest(a_job()) == a_job()


@pytest.mark.parametrize(
    ("path", "goal", "pruning", "refused"),
    [
        (
            "objective.dpo.beta",
            {"metric": "validation/loss", "mode": "min"},
            "none",
            "goal.metric: validation/loss is another measure",
        ),
        ("objective.dpo.beta", {"metric": "test/loss", "mode": "min"}, "none", "goal.metric: test/loss is another measure"),
        ("objective.dpo.labelSmoothing", {"metric": "task/f1", "mode": "max"}, "asha", "search.pruning: the validation loss is another"),
        ("objective.dpo.beta", {"metric": "task/f1", "mode": "max"}, "none", None),
        ("training.learningRate", {"metric": "validation/loss", "mode": "min"}, "asha", None),
        ("objective.distillation.labelWeight", {"metric": "validation/loss", "mode": "min"}, "asha", None),
    ],
)
def test_trials_are_compared_by_one_measure(path: str, goal: dict[str, str], pruning: str, refused: str | None) -> None:
    """What a preference costs is scaled by beta: the largest beta would always win. What distillation is measured by has no weights."""
    asked = plan(parameters={path: {"uniform": [0.1, 0.4]}}, goal=goal, pruning=pruning)
    if refused is None:
        assert check_comparable(asked) is None
    else:
        with pytest.raises(JobError, match=refused) as failed:
            check_comparable(asked)
        assert failed.value.reason == Reason.INVALID_SPEC
