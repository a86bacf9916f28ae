"""Findings as jobs really have them, for the tests of the report."""

import math
import random
from typing import Any

from finetune_api.report import Report
from finetune_api.status import (
    BaselineResult,
    ComparedResult,
    DataSummary,
    Difference,
    Evaluation,
    EvaluationResult,
    GateResult,
    Health,
    Resolved,
    SearchBest,
    SearchSummary,
    TokenStatistics,
)
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.evaluation.history import Course, Point
from finetune_trainer.evaluation.markdown import Findings
from finetune_trainer.evaluation.samples import Sample
from finetune_trainer.trials import Trial

UID = "5f7c0e2e-0000-4000-8000-000000000001"


def job(name: str = "support-bot", uid: str = UID, **spec: Any) -> FineTuneJob:
    return parse_job(
        {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": "team-a", "uid": uid},
            "spec": {
                "model": {"source": "hf://org/model"},
                "data": {"train": {"source": "pvc://data/train.jsonl"}, "test": {"source": "pvc://data/test.jsonl"}},
                "method": {"lora": {}},
                "output": {"storage": "pvc://models/bot"},
                **spec,
            },
        }
    )


def result(metric: str, before: float | None, after: float | None, wide: float | None = None, **more: Any) -> EvaluationResult:
    """A metric's result, its interval so wide to each side, and the change's half as wide again."""
    known = wide is not None and after is not None
    change = None
    if before is not None and after is not None:
        low, high = (after - before - 1.5 * wide, after - before + 1.5 * wide) if wide is not None else (None, None)
        change = Difference(value=after - before, low=low, high=high)
    ends = {"low": after - wide, "high": after + wide} if known and wide is not None and after is not None else {}
    return EvaluationResult(metric=metric, value=after, baseline=before, difference=change, n=500 if known else None, **ends, **more)


def course(steps: int = 600, every: int = 50) -> Course:
    """A training that overfits in its second half."""
    chance = random.Random(7)  # noqa: S311 - noise in a picture
    train, held_out = [], [Point(0, {"validation/loss": 2.41})]
    for step in range(1, steps + 1):
        done = step / steps
        loss = 0.55 + 1.8 * math.exp(-5 * done) - 0.25 * done + chance.gauss(0, 0.07)
        train.append(
            Point(step, {"train/loss": loss, "train/learningRate": 2e-4 * min(1.0, step / 30) * (1 + math.cos(math.pi * done)) / 2})
        )
        if step % every == 0:
            held_out.append(Point(step, {"validation/loss": 0.75 + 1.7 * math.exp(-5 * done) + 0.5 * max(0.0, done - 0.5) ** 2}))
    return Course(tuple(train), tuple(held_out))


OTHER = ComparedResult(other="support-bot-v1", value=0.77, difference=Difference(value=0.04, low=0.01, high=0.07))
RESULTS = (
    result("validation/loss", 2.41, 0.88),
    result("validation/perplexity", math.exp(2.41), math.exp(0.88)),
    result("task/exactMatch", 0.12, 0.81, 0.034, compared=(OTHER,)),
    result("task/f1", 0.41, 0.88, 0.021),
    result("task/rougeL", 0.38, 0.40, 0.03),
    result("task/bleu", 8.4, 31.2, 2.2),
    result("retention/loss", 1.92, 2.06, 0.03),
)
GATES = (
    GateResult(metric="task/exactMatch", verdict="Passed", observed=0.81, low=0.776, high=0.844, required="at least 0.75"),
    GateResult(
        metric="task/rougeL",
        verdict="Inconclusive",
        observed=0.02,
        low=-0.025,
        high=0.065,
        required="better by at least 0.01",
        over="baseline",
    ),
    GateResult(
        metric="retention/loss",
        verdict="Failed",
        observed=0.14,
        low=0.095,
        high=0.185,
        required="larger by at most 0.05",
        over="baseline",
    ),
)
EVALUATION = Evaluation(
    results=RESULTS,
    gates=GATES,
    health=(
        Health(name="forgetting", suite="retention", verdict="Bad", message="loss 1.92 before, 2.06 after: worse by 0.095 to 0.185"),
        Health(name="overfitting", verdict="Good", message="the gap is 0.21 and does not grow"),
    ),
    candidate=600,
)
BASELINES = (
    BaselineResult(prompt="zero-shot", metric="task/f1", value=0.31, low=0.28, high=0.34),
    BaselineResult(prompt="few-shot", metric="task/f1", value=0.44, low=0.41, high=0.48),
    BaselineResult(prompt="rag", metric="task/f1", value=0.61, low=0.57, high=0.64, best=True),
    BaselineResult(prompt="zero-shot", model="bigger", metric="task/f1", value=0.52, low=0.49, high=0.55),
)
BEST = SearchBest(trial=5, value=0.91, parameters={"training.learningRate": 2e-4, "method.lora.rank": 16})
REPORT = Report(
    job_uid=UID,
    attempt=1,
    resolved=Resolved(model_revision="5a6f00c1", data_digest="sha256:aa", config_digest="sha256:bb"),
    data=DataSummary(
        train=4021,
        validation=446,
        test=500,
        tokens=1_834_022,
        rejected=3,
        duplicates=57,
        leaked=2,
        made=1200,
        made_samples=("What does the warranty cover?\nParts and labour for two years.",),
        tokens_per_example=TokenStatistics(min=12, median=301, p95=1204, max=2048),
    ),
    baseline=BASELINES,
    search=SearchSummary(trials=8, completed=6, failed=1, pruned=1, best=BEST),
    evaluation=EVALUATION,
    warnings=("2 training examples stand in the test data too: see rejects.jsonl",),
)
SAMPLE = Sample(
    suite="task",
    id="000017",
    prompt="user: My order 4711 has not arrived. What can I do?",
    reference="Please check the tracking page; after ten days we send a replacement.",
    untuned="As an AI language model I cannot track orders.",
    tuned="Please look at the tracking page. If ten days have passed, we send you a replacement.",
)


SEARCH = {"parameters": {"training.learningRate": {"logUniform": [1e-5, 1e-3]}, "method.lora.rank": {"choice": [8, 16]}}}
TRIALS = (
    Trial(1, {"training.learningRate": 2e-5, "method.lora.rank": 16}, "Completed", 1.8),
    Trial(2, {"training.learningRate": 5e-5, "method.lora.rank": 8}, "Completed", 1.45),
    Trial(3, {"training.learningRate": 1e-4, "method.lora.rank": 16}, "Completed", 1.2),
    Trial(4, {"training.learningRate": 0.000177828, "method.lora.rank": 8}, "Completed", 1.05),
    Trial(5, {"training.learningRate": 2e-4, "method.lora.rank": 16}, "Completed", 0.91),
    Trial(6, {"training.learningRate": 9e-4, "method.lora.rank": 8}, "Completed", 1.1),
    Trial(7, {"training.learningRate": 1e-3, "method.lora.rank": 8}, "Failed", reason="TrainingDiverged"),
)


def findings(**changes: Any) -> Findings:
    """All of the above; `changes` replaces fields of the report, of the evaluation where it is one of its own, or of the findings."""
    spec = {"search": SEARCH, **changes.pop("spec", {})}
    of_evaluation = {name: changes.pop(name) for name in list(changes) if name in Evaluation.model_fields}
    of_report = {name: changes.pop(name) for name in list(changes) if name in Report.model_fields}
    evaluation = EVALUATION.model_copy(update=of_evaluation)
    report = REPORT.model_copy(update={"evaluation": evaluation, **of_report})
    return Findings(**{"job": job(**spec), "report": report, "course": course(), "samples": (SAMPLE,), "trials": TRIALS, **changes})
