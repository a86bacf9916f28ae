"""Rules of the closed loop that hold between parts of a spec: as CEL for `kubectl apply`, and beside it in Python."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel

from finetune_api.monitoring import NEEDS_MODEL, measured_again
from finetune_api.search import SEARCHABLE

if TYPE_CHECKING:
    from finetune_api.v1alpha1 import Spec

VALIDATION_METRICS = ("validation/loss", "validation/perplexity")
"""Measured of every job."""
TEST_METRICS = ("test/loss", "test/perplexity")
"""Measured where data.test is there."""
GAP = "train/gap"
"""Validation loss less training loss, at the end."""


@dataclass(frozen=True)
class LoopRule:
    """One rule over the whole spec."""

    cel: str
    message: str
    holds: "Callable[[Spec], bool]"


def known_metrics(spec: "Spec") -> frozenset[str]:
    """Metrics that a gate may name."""
    return spec.evaluation.metric_names | {*VALIDATION_METRICS, *(TEST_METRICS if spec.data.test else ()), GAP}


def answered_metrics(spec: "Spec") -> frozenset[str]:
    """Metrics of the suites with examples: what a prompt can be measured by."""
    return frozenset(name for suite in spec.evaluation.suites if suite.lm_eval is None for name in suite.metric_names)


def goal_metrics(spec: "Spec") -> frozenset[str]:
    """Metrics that a search may be judged by."""
    return answered_metrics(spec) | {*VALIDATION_METRICS, *(TEST_METRICS if spec.data.test else ())}


_SUITES = "self.evaluation.suites.exists(suite, suite.metrics.exists(metric, {0} == suite.name + '/' + metric))"
_TASKS = "self.evaluation.suites.exists(suite, has(suite.lmEval) && suite.lmEval.tasks.exists(task, {0} == suite.name + '/' + task))"
_HELD_OUT = f"{{0}} in {list(VALIDATION_METRICS)} || (has(self.data.test) && {{0}} in {list(TEST_METRICS)})"


def _gates_are_known(spec: "Spec") -> bool:
    return {gate.metric for gate in spec.evaluation.gates} <= known_metrics(spec)


def _suites_have_data(spec: "Spec") -> bool:
    return spec.data.test is not None or all(suite.source != "test" for suite in spec.evaluation.suites)


def _prompts_are_measured(spec: "Spec") -> bool:
    return spec.baseline is None or bool(answered_metrics(spec))


def _baseline_is_known(spec: "Spec") -> bool:
    sufficient = spec.baseline and spec.baseline.sufficient_if
    named = {spec.baseline.metric if spec.baseline else None, sufficient.metric if sufficient else None} - {None}
    return named <= answered_metrics(spec)


def _goal_is_known(spec: "Spec") -> bool:
    return spec.search is None or spec.search.goal.metric in goal_metrics(spec)


def _made_examples_fit(spec: "Spec") -> bool:
    return spec.objective.dpo is None or not spec.data.preparation.makes_examples


def _monitored_are_suites(spec: "Spec") -> bool:
    return spec.monitoring is None or {suite.name for suite in spec.monitoring.suites} <= measured_again(spec).keys()


def _endpoint_gives_metrics(spec: "Spec") -> bool:
    return all(metrics for metrics in measured_again(spec).values())


def _degraded_is_measured(spec: "Spec") -> bool:
    found = {f"{suite}/{metric}" for suite, metrics in measured_again(spec).items() for metric in metrics}
    return spec.monitoring is None or {bound.metric for bound in spec.monitoring.degraded_if} <= found


def _optional_parts(model: BaseModel | None, path: str, parts: Iterable[str]) -> bool:
    """Whether every part on the way is set."""
    for part in parts:
        if model is None:
            return False
        fields = {info.alias or name: name for name, info in type(model).model_fields.items()}
        model, path = getattr(model, fields[part]), f"{path}.{part}"
    return model is not None


def _search_is_inside(spec: "Spec") -> bool:
    paths = spec.search.parameters if spec.search else ()
    return all(_optional_parts(spec, "", path.split(".")[:-1]) for path in paths)


def _parents() -> list[str]:
    """The objects that searchable fields are in and that a spec may be without."""
    folders = {".".join(path.split(".")[:-1]) for path in SEARCHABLE}
    return sorted(folder for folder in folders if folder.count(".") > 0)


def _has(path: str) -> str:
    """CEL that says whether an object is there, with all that it is in."""
    parts = path.split(".")
    return " && ".join(f"has(self.{'.'.join(parts[:end])})" for end in range(2, len(parts) + 1))


_SEARCH_IS_INSIDE = " && ".join(f"(!path.startsWith('{parent}.') || ({_has(parent)}))" for parent in _parents())


def _plan_needs_nothing_made(spec: "Spec") -> bool:
    distillation = spec.objective.distillation
    served = distillation is not None and distillation.teacher.endpoint is not None
    return not (spec.plan_only and (served or spec.data.preparation.makes_examples))


LOOP_RULES: tuple[LoopRule, ...] = (
    LoopRule(
        "self.evaluation.gates.all(gate, "
        + " || ".join(form.format("gate.metric") for form in (f"gate.metric == '{GAP}'", _HELD_OUT, _SUITES, _TASKS))
        + ")",
        "evaluation.gates: every metric must be suite/metric of evaluation.suites, validation/loss, validation/perplexity, train/gap, or "
        "with data.test test/loss or test/perplexity",
        _gates_are_known,
    ),
    LoopRule(
        "has(self.data.test) || self.evaluation.suites.all(suite, !has(suite.source) || suite.source != 'test')",
        "evaluation.suites: the source test needs data.test",
        _suites_have_data,
    ),
    LoopRule(
        "!has(self.baseline) || self.evaluation.suites.exists(suite, !has(suite.lmEval))",
        "baseline needs a suite with examples in evaluation.suites, which the prompts are measured on",
        _prompts_are_measured,
    ),
    LoopRule(
        f"!has(self.baseline) || !has(self.baseline.metric) || {_SUITES.format('self.baseline.metric')}",
        "baseline.metric and baseline.sufficientIf.metric must be suite/metric of evaluation.suites",
        _baseline_is_known,
    ),
    LoopRule(
        "!has(self.baseline) || !has(self.baseline.sufficientIf) || " + _SUITES.format("self.baseline.sufficientIf.metric"),
        "baseline.metric and baseline.sufficientIf.metric must be suite/metric of evaluation.suites",
        _baseline_is_known,
    ),
    LoopRule(
        f"!has(self.search) || {_HELD_OUT.format('self.search.goal.metric')} || {_SUITES.format('self.search.goal.metric')}",
        "search.goal.metric must be suite/metric of evaluation.suites, validation/loss, validation/perplexity, or with data.test "
        "test/loss or test/perplexity",
        _goal_is_known,
    ),
    LoopRule(
        f"!has(self.search) || self.search.parameters.all(path, {_SEARCH_IS_INSIDE})",
        "search.parameters must be fields of what the spec sets: method.lora.rank needs method.lora",
        _search_is_inside,
    ),
    LoopRule(
        "!has(self.objective.dpo) || (!has(self.data.preparation.contentPoints) && !has(self.data.preparation.questions))",
        "data.preparation.contentPoints and questions make prompts and completions, which objective.dpo does not take",
        _made_examples_fit,
    ),
    LoopRule(
        "!self.planOnly || (!has(self.data.preparation.contentPoints) && !has(self.data.preparation.questions) && "
        "(!has(self.objective.distillation) || !has(self.objective.distillation.teacher.endpoint)))",
        "planOnly counts data that is there: it goes with neither data.preparation.contentPoints, questions nor a teacher's endpoint",
        _plan_needs_nothing_made,
    ),
    LoopRule(
        "!has(self.monitoring) || self.monitoring.suites.all(fresh, "
        "self.evaluation.suites.exists(suite, suite.name == fresh.name && !has(suite.lmEval)))",
        "monitoring.suites must be names of evaluation.suites that have examples (no lmEval)",
        _monitored_are_suites,
    ),
    LoopRule(
        "!has(self.monitoring) || !has(self.monitoring.endpoint) || self.evaluation.suites.all(suite, has(suite.lmEval) || "
        "!self.monitoring.suites.exists(fresh, fresh.name == suite.name) || "
        f"suite.metrics.exists(metric, !(metric in {list(NEEDS_MODEL)})))",
        f"monitoring.suites: an endpoint gives no {', '.join(NEEDS_MODEL[:-1])} and {NEEDS_MODEL[-1]}, so each suite needs another metric",
        _endpoint_gives_metrics,
    ),
    LoopRule(
        "!has(self.monitoring) || self.monitoring.degradedIf.all(bound, "
        f"(!has(self.monitoring.endpoint) || !{[f'/{metric}' for metric in NEEDS_MODEL]}.exists(end, bound.metric.endsWith(end))) && "
        f"self.monitoring.suites.exists(fresh, bound.metric.startsWith(fresh.name + '/')) && {_SUITES.format('bound.metric')})",
        "monitoring.degradedIf: every metric must be suite/metric of monitoring.suites, and one that is measured there",
        _degraded_is_measured,
    ),
)
