"""spec.planOnly on the head, with the quickstart's model and data: counted exactly, the same as config.json alone gives."""

import json
from pathlib import Path

import pytest
from tests.unit.trainer_run.test_prepare_stage import EXAMPLES, attempt, data

from finetune_api.architecture import architecture_of
from finetune_api.planning import Counted, Given, device_of, plan_of, sizes_of
from finetune_api.v1alpha1 import stages_of
from finetune_trainer import run
from finetune_trainer.attempt import Attempt
from finetune_trainer.data.batches import plan_batches
from finetune_trainer.data.examples import open_prepared
from finetune_trainer.head import ended_well
from finetune_trainer.report import Reporter
from finetune_trainer.run import earlier_report, run_stages

__all__ = ["data"]


def planning(path: Path, number: int = 1, **training: object) -> Attempt:
    made = attempt(path, number=number, **training)
    made.job = made.job.model_copy(update={"spec": made.job.spec.model_copy(update={"plan_only": True})})
    made.reporter = Reporter("u1", number, stages=stages_of(made.job.spec))
    made.following._reporter = made.reporter
    return made


def test_a_plan_is_made_of_what_was_counted(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("it was trained"))
    made = planning(data, epochs=2)
    run_stages(made)
    report = made.reporter.report
    plan, spec = report.plan, made.job.spec
    assert plan is not None
    facts = made.own.read_json("prepared.json")
    assert facts is not None
    train = open_prepared(made.storage.location(facts["folder"]), made.cache).train
    batches = plan_batches(train, spec.training)
    assert (plan.steps, plan.sequences, plan.tokens_per_epoch) == (batches.total_steps, len(batches.rows), len(train.tokens))
    assert report.model is not None
    assert (plan.parameters, plan.trained_parameters) == (report.model.parameters, report.model.trained_parameters)
    assert report.workers_wanted == 0
    assert [stage.name for stage in report.stages] == ["Prepare"]
    assert ended_well(report).startswith(f"planned: {plan.steps} steps, about ")
    # Who has only the configuration comes to the same plan.
    known = architecture_of(json.loads((EXAMPLES / "models/tiny-llama/config.json").read_text()))
    given = Given(device_of(spec, None), Counted(plan.tokens_per_epoch or 0, plan.sequences or 0))
    assert plan == plan_of(spec, sizes_of(known, spec), given)


def test_it_publishes_nothing_and_another_attempt_says_it_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = planning(data)
    run_stages(first)
    out = data.parent / "out"
    assert sorted(path.name for path in out.iterdir()) == [".finetune"]
    kept = earlier_report(first)
    assert kept is not None
    assert (kept.outcome, kept.plan) == ("Succeeded", first.reporter.report.plan)
    monkeypatch.setattr("finetune_trainer.preparing.prepare", lambda *_: pytest.fail("it was prepared again"))
    second = planning(data, number=2)
    run_stages(second)
    assert second.reporter.report.plan == kept.plan
