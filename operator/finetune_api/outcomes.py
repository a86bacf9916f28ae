"""The part of a status that tells what was measured: the baseline, the search, the results, the gates."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.fields import StatusModel
from finetune_api.status_fields import AnyScalar, Count, MeasureName, Text, Uri

RESULTS_MAX = 264
"""All metrics of as many suites as a spec may hold, what an objective measures of validation and test data, and their gap."""
COMPARED_MAX = 8
"""Others that a result stands beside, as many as compareWith may name."""
BASELINES_MAX = 64
_ShortText = Annotated[str, Field(max_length=128)]


class BaselineResult(StatusModel):
    """What one way to ask an untuned model came to."""

    prompt: Annotated[str, Field(max_length=64)]
    """Name of the prompt strategy."""
    model: Annotated[str, Field(max_length=64)] | None = None
    """Name of the model in baseline.models; absent is the base model."""
    metric: MeasureName
    """Name as suite/metric."""
    value: float
    """The value; never NaN or infinite."""
    low: float | None = None
    """Lower end of its confidence interval."""
    high: float | None = None
    """Upper end of its confidence interval."""
    best: bool = False
    """Whether it is the best of all by baseline.metric."""


class SearchBest(StatusModel):
    """The trial that did best, whose values are trained to the end."""

    trial: Count
    """Number of the trial, from 1."""
    value: float
    """Value of the goal's metric; never NaN or infinite."""
    parameters: Annotated[dict[str, AnyScalar], Field(max_length=8)] = {}
    """The values that it was given, by the path of their field."""


class SearchSummary(StatusModel):
    """How far the search is."""

    trials: Count = 0
    """Trials in all."""
    completed: Count = 0
    """Trials that came to their end."""
    failed: Count = 0
    """Trials that failed; the search goes on without them."""
    pruned: Count = 0
    """Trials that were stopped early."""
    best: SearchBest | None = None
    """The best trial so far."""


class Difference(StatusModel):
    """A difference of two values on the same examples."""

    value: float
    """The tuned model's value less the other; never NaN or infinite."""
    low: float | None = None
    """Lower end of its confidence interval, by paired bootstrap."""
    high: float | None = None
    """Upper end of its confidence interval."""


class ComparedResult(StatusModel):
    """One measure of another job, or of an earlier checkpoint, beside the tuned model's."""

    other: Annotated[str, Field(max_length=64, alias="with")]
    """Name of the other job, or step-N for the checkpoint of a step."""
    value: float | None = None
    """The other's value."""
    difference: Difference | None = None
    """The tuned model's value less the other's."""


class EvaluationResult(StatusModel):
    """One measure of the tuned model beside the untuned one's."""

    metric: MeasureName
    """Name as suite/measure: test/loss."""
    value: float | None = None
    """The tuned model's."""
    baseline: float | None = None
    """The untuned model's."""
    low: float | None = None
    """Lower end of the value's confidence interval."""
    high: float | None = None
    """Upper end of the value's confidence interval."""
    difference: Difference | None = None
    """The tuned model's value less the untuned one's."""
    n: Count | None = None
    """Examples that it was measured on."""
    compared: Annotated[tuple[ComparedResult, ...], Field(max_length=COMPARED_MAX)] = ()
    """The same measure of the jobs in evaluation.compareWith, and with checkpoints there of earlier ones."""


Verdict = Literal["Passed", "Failed", "Inconclusive"]


class GateResult(StatusModel):
    """Whether a gate is passed."""

    metric: MeasureName
    """Name as suite/metric."""
    verdict: Verdict
    """Inconclusive where the bound is inside the confidence interval."""
    observed: float | None = None
    """The value, or the change against `over`, that was held against the bound."""
    low: float | None = None
    """Lower end of its confidence interval."""
    high: float | None = None
    """Upper end of its confidence interval."""
    required: _ShortText
    """The bound in words: at least 0.8."""
    over: Annotated[str, Field(max_length=64)] | None = None
    """What it was compared with: baseline or another job."""


class Health(StatusModel):
    """Whether the tuned model shows a known ill."""

    name: Literal["forgetting", "overfitting"]
    """forgetting: a suite of that role is worse than before; overfitting: the validation loss rises away from the training loss."""
    suite: Annotated[str, Field(max_length=64)] | None = None
    """The suite that it was found in."""
    verdict: Literal["Good", "Bad", "Inconclusive"]
    """Good: not found."""
    message: Text = ""
    """Why, with the figures."""


class Evaluation(StatusModel):
    """The comparison of the untuned and the tuned model."""

    results: Annotated[tuple[EvaluationResult, ...], Field(max_length=RESULTS_MAX)] = ()
    """One entry for each measure."""
    gates: Annotated[tuple[GateResult, ...], Field(max_length=16)] = ()
    """One entry for each of evaluation.gates, in their order."""
    health: Annotated[tuple[Health, ...], Field(max_length=32)] = ()
    """Forgetting by suite, and overfitting."""
    candidate: Count | None = None
    """Optimiser step of the checkpoint that was measured and judged."""
    report: Uri | None = None
    """The report for people, with tables and pictures."""

    @property
    def gates_verdict(self) -> Verdict | None:
        """The verdict on all gates: Failed where one failed, Passed where all passed; None where there are none."""
        verdicts = {gate.verdict for gate in self.gates}
        return next((verdict for verdict in _WORST_FIRST if verdict in verdicts), None)


_WORST_FIRST: tuple[Verdict, ...] = ("Failed", "Inconclusive", "Passed")
