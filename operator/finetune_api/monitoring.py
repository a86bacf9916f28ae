"""After the release: on what schedule and on which fresh data the published model is measured again, and what counts as degraded."""

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_api.evaluation import SCORED_METRICS, SuiteMetric
from finetune_api.fields import BY_NAME, MetricName, ShortName, SpecModel, check, check_names_distinct, rules
from finetune_api.preparation import TEXT_ALONE
from finetune_api.schedule import Schedule
from finetune_api.sources import DataSource, Endpoint

if TYPE_CHECKING:
    from finetune_api.v1alpha1 import Spec

NEEDS_MODEL: tuple[SuiteMetric, ...] = (*SCORED_METRICS, "judgeWinRate")
"""Metrics that no endpoint gives: those of the golden answer's tokens, and the one that the untuned model's answers are needed for."""


class MonitoredSuite(DataSource):
    """Fresh examples for a suite: a source that grows, read anew in every run."""

    name: ShortName
    """Name of the suite in evaluation.suites, whose metrics are measured again."""


class DegradedBound(SpecModel):
    """How much worse a metric may become."""

    metric: MetricName
    """Metric of one of monitoring.suites, as suite/metric."""
    worse_by: Annotated[float, Field(ge=0)] = 0.0
    """The model is degraded where the whole interval of the fresh figure is worse than the released figure by more than this."""

    @property
    def name(self) -> str:
        """What no two bounds share."""
        return str(self.metric)


class MonitoringPlan(SpecModel):
    """When and on what the published model, or the endpoint that serves it, is measured again. It trains and publishes nothing."""

    model_config = ConfigDict(json_schema_extra=rules(TEXT_ALONE))

    schedule: Schedule
    """When, as cron has it, in UTC: minute, hour, day of the month, month, day of the week. A time at which a run is still under way, or
    the operator was away, is made up for once."""
    suites: Annotated[
        tuple[MonitoredSuite, ...], Field(min_length=1, max_length=16, json_schema_extra=BY_NAME), AfterValidator(check_names_distinct)
    ]
    """Suites of evaluation.suites that are measured again, each on data of its own; lmEval's tasks are not."""
    endpoint: Endpoint | None = None
    """The endpoint that serves the published model; absent measures the published artifact itself, on the job's workers. An endpoint gives
    no loss, perplexity, tokenAccuracy and judgeWinRate: these are left out."""
    degraded_if: Annotated[
        tuple[DegradedBound, ...],
        Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["metric"]}),
        AfterValidator(check_names_distinct),
    ] = ()
    """Metrics that are judged, and how much worse they may be; absent judges all that are measured, with worseBy 0."""

    @model_validator(mode="after")
    def _text_alone(self) -> Self:
        check(self.endpoint is None or self.endpoint.top_logprobs == 0, TEXT_ALONE["message"])
        return self

    def worse_by(self, metric: str) -> float | None:
        """How much worse a metric may be; None where it is not judged."""
        bounds = {bound.metric: bound.worse_by for bound in self.degraded_if}
        return bounds.get(metric) if bounds else 0.0


def measured_again(spec: "Spec") -> dict[str, tuple[SuiteMetric, ...]]:
    """By suite, the metrics that a run measures, in the suites' order."""
    plan = spec.monitoring
    if plan is None:
        return {}
    left_out = NEEDS_MODEL if plan.endpoint is not None else ()
    named = {suite.name for suite in plan.suites}
    return {
        suite.name: tuple(metric for metric in suite.metrics if metric not in left_out)
        for suite in spec.evaluation.suites
        if suite.name in named and suite.lm_eval is None
    }
