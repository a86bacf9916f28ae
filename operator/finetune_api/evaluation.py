"""How the tuned model is measured beside the untuned one, and what it must reach to be published."""

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_api import JOB_NAME_MAX
from finetune_api.fields import (
    BY_NAME,
    LABEL_PATTERN,
    MetricName,
    ShortName,
    SpecModel,
    SplitName,
    SubsetName,
    SuiteSource,
    Template,
    check,
    check_distinct,
    check_exactly_one,
    check_names_distinct,
    described,
    exactly_one,
    rule,
    rules,
)
from finetune_api.patterns import check_pattern
from finetune_api.preparation import TEXT_ALONE
from finetune_api.sources import (
    SECRET_NEEDS_REMOTE,
    SPLIT_NEEDS_HUB,
    ConfigMapSource,
    DataSource,
    Endpoint,
    ModelReference,
    SecretReference,
    check_secret,
    check_split,
)

SuiteMetric = Literal[
    "loss",
    "perplexity",
    "tokenAccuracy",
    "exactMatch",
    "f1",
    "rouge1",
    "rouge2",
    "rougeL",
    "bleu",
    "chrf",
    "jsonValidity",
    "regex",
    "embeddingSimilarity",
    "judgeScore",
    "judgeWinRate",
]
SCORED_METRICS: tuple[SuiteMetric, ...] = ("loss", "perplexity", "tokenAccuracy")
"""Metrics of the golden answer's own tokens: nothing is generated for them."""
GENERATED_METRICS: tuple[SuiteMetric, ...] = tuple(metric for metric in get_args(SuiteMetric) if metric not in SCORED_METRICS)
"""Metrics of a generated answer; the higher the better."""
JUDGED_METRICS: tuple[SuiteMetric, ...] = ("judgeScore", "judgeWinRate")
_SHORT = Field(json_schema_extra={"maxLength": max(len(metric) for metric in get_args(SuiteMetric))})
"""For API servers that do not conclude it from the words, and count CEL's cost by it."""
LOWER_IS_BETTER = ("loss", "perplexity", "gap")
"""Metrics, after the suite's name, that improve by falling; all others improve by rising."""
OWN_SUITES = ("validation", "test", "train", "baseline")
"""Names that a suite may not have: what is measured anyway has them."""
HELD_OUT = ("test", "validation")
"""Suite sources that are the job's own held-out data."""


class Judge(SpecModel):
    """A served model that judges answers."""

    model_config = ConfigDict(json_schema_extra=rules(TEXT_ALONE))

    endpoint: Endpoint
    """The model."""
    instruction: Template = (
        "A good answer does what the prompt asks, is correct, and says what the reference answer says. Its length does not matter."
    )
    """What makes an answer good, in words for the judge."""

    @model_validator(mode="after")
    def _text_alone(self) -> Self:
        check(self.endpoint.top_logprobs == 0, TEXT_ALONE["message"])
        return self


LmEvalTask = Annotated[
    str,
    Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$"),
    described("the name of a task of lm-eval (letters, digits, _, . and -), at most 64 characters"),
]


class LmEval(SpecModel):
    """Tasks of EleutherAI's lm-evaluation-harness, which the trainer image must hold. Each gives a metric of its name."""

    tasks: Annotated[
        tuple[LmEvalTask, ...],
        Field(min_length=1, max_length=16, json_schema_extra={"x-kubernetes-list-type": "set"}),
        AfterValidator(check_distinct),
    ]
    """Names of tasks, such as hellaswag. The value is the task's first metric; the metric's name here is suite/task."""
    few_shot: Annotated[int, Field(ge=0, le=64)] = 0
    """Examples of the task that are shown before each question."""


_NAME_IS_FREE = rule(
    f"!(self.name in {list(OWN_SUITES)})", f"name must not be {', '.join(OWN_SUITES[:-1])} or {OWN_SUITES[-1]}: these are measured anyway"
)
_METRICS_GO_WITH_DATA = rule(
    "has(self.lmEval) == (self.metrics.size() == 0)",
    "metrics must name at least one, or lmEval be set, whose tasks have metrics of their own",
)
_NEEDS = (
    rule("has(self.pattern) == ('regex' in self.metrics)", "pattern goes with the metric regex, which needs it"),
    rule(
        "has(self.encoder) == ('embeddingSimilarity' in self.metrics)",
        "encoder goes with the metric embeddingSimilarity, which needs it",
    ),
    rule(
        "has(self.judge) == ('judgeScore' in self.metrics || 'judgeWinRate' in self.metrics)",
        "judge goes with the metrics judgeScore and judgeWinRate, which need it",
    ),
)


class Suite(SpecModel):
    """Examples or tasks that the untuned and the tuned model are measured on. Exactly one of source, configMap and lmEval."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            exactly_one("source", "configMap", "lmEval"),
            SECRET_NEEDS_REMOTE,
            SPLIT_NEEDS_HUB,
            _NAME_IS_FREE,
            _METRICS_GO_WITH_DATA,
            *_NEEDS,
        )
    )

    name: ShortName
    """Name of the suite; its metrics are called suite/metric."""
    source: SuiteSource | None = None
    """test or validation for the job's own held-out data, or where the data is: pvc://claim/path, s3://bucket/path or
    hf://datasets/owner/name/path. Local runs also take file://path."""
    config_map: ConfigMapSource | None = None
    """Data that stands in a ConfigMap."""
    split: SplitName | None = None
    """Split of a hub data set; as in data.train."""
    subset: SubsetName | None = None
    """Subset of a hub data set; as in data.train."""
    secret_ref: SecretReference | None = None
    """Secret for the source; as in data.train."""
    role: Literal["task", "forgetting"] = "task"
    """task: what the model is tuned for; forgetting: what it should still do as well as before."""
    metrics: Annotated[
        tuple[Annotated[SuiteMetric, _SHORT], ...],
        Field(max_length=15, json_schema_extra={"x-kubernetes-list-type": "set"}),
        AfterValidator(check_distinct),
    ] = ()
    """What is measured. loss, perplexity and tokenAccuracy are of the golden answer's own tokens; all others are of a generated answer:
    exactMatch, f1 (words, as SQuAD's), rouge1, rouge2, rougeL, bleu, chrf, jsonValidity, regex, embeddingSimilarity (cosine with the golden
    answer), judgeScore (0 to 1) and judgeWinRate (share of answers that a judge prefers to the untuned model's, in both orders)."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 128
    """Tokens of a generated answer at most."""
    limit: Annotated[int, Field(ge=1, le=1000000)] | None = None
    """Examples that are measured at most, the first; absent is all."""
    pattern: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(check_pattern)] | None = None
    """Regular expression that the metric regex searches an answer for. Look-around and back references are not allowed."""
    encoder: ModelReference | None = None
    """Encoder of transformers or sentence-transformers for the metric embeddingSimilarity."""
    judge: Judge | None = None
    """Judge for the metrics judgeScore and judgeWinRate."""
    lm_eval: LmEval | None = None
    """Tasks of the lm-evaluation-harness, instead of examples and metrics."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_exactly_one(self, "source", "configMap", "lmEval")
        check_secret(self.secret_ref, self.source)
        check_split(self.split, self.subset, self.source)
        check(self.name not in OWN_SUITES, _NAME_IS_FREE["message"])
        return self

    @model_validator(mode="after")
    def _metrics_have_what_they_need(self) -> Self:
        check((self.lm_eval is not None) == (not self.metrics), _METRICS_GO_WITH_DATA["message"])
        pattern, encoder, judge = (entry["message"] for entry in _NEEDS)
        check((self.pattern is not None) == ("regex" in self.metrics), pattern)
        check((self.encoder is not None) == ("embeddingSimilarity" in self.metrics), encoder)
        check((self.judge is not None) == bool(set(JUDGED_METRICS) & set(self.metrics)), judge)
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What the suite measures, as suite/metric or suite/task."""
        return tuple(f"{self.name}/{metric}" for metric in (self.lm_eval.tasks if self.lm_eval else self.metrics))

    @property
    def generates(self) -> bool:
        """Whether answers have to be generated for its metrics."""
        return any(metric in GENERATED_METRICS for metric in self.metrics)

    def data_source(self) -> DataSource | None:
        """The data of its own, or None where the job's held-out data or lm-eval's tasks are measured."""
        if self.lm_eval is not None or self.source in HELD_OUT:
            return None
        return DataSource.model_construct(
            source=self.source, config_map=self.config_map, split=self.split, subset=self.subset, secret_ref=self.secret_ref
        )


BASELINE = "baseline"
"""What the untuned model is called where something is compared with it."""
EARLIER = "checkpoints"
"""What the job's own earlier checkpoints are called in compareWith; each is called step-N beside the results."""
_NAME = Field(min_length=1, max_length=JOB_NAME_MAX, pattern=LABEL_PATTERN)
Comparison = Annotated[str, _NAME, described(f"baseline, checkpoints or a job's name, at most {JOB_NAME_MAX} characters")]
NOT_BESIDE_ITSELF = rule(
    f"self.metadata.name in {[BASELINE, EARLIER]} || !(self.metadata.name in self.spec.evaluation.compareWith)",
    "spec.evaluation.compareWith names this job itself: name another job, or baseline for the untuned model",
)
"""Of the whole job."""
BOUNDS = ("atLeast", "atMost", "minImprovement", "maxIncrease")
_OVER_GOES_WITH_CHANGE = rule(
    "has(self.over) == (has(self.minImprovement) || has(self.maxIncrease))", "over goes with minImprovement and maxIncrease, which need it"
)


class Gate(SpecModel):
    """A bound that the tuned model must keep to be published. Exactly one of atLeast, atMost, minImprovement and maxIncrease."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one(*BOUNDS), _OVER_GOES_WITH_CHANGE))

    metric: MetricName
    """Metric of a suite as suite/metric, validation/loss, validation/perplexity, train/gap (validation loss less training loss), or with
    data.test test/loss and test/perplexity."""
    at_least: float | None = None
    """The value must not be smaller."""
    at_most: float | None = None
    """The value must not be larger."""
    min_improvement: Annotated[float, Field(ge=0)] | None = None
    """The value must be better than that of `over` by at least this: larger, or for a loss, perplexity or gap smaller."""
    max_increase: Annotated[float, Field(ge=0)] | None = None
    """The value must not be larger than that of `over` by more than this."""
    over: Annotated[str, _NAME, described(f"baseline or a job's name, at most {JOB_NAME_MAX} characters")] | None = None
    """What it is compared with: baseline (the untuned model), or a job of compareWith."""

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        check_exactly_one(self, *BOUNDS)
        change = self.min_improvement is not None or self.max_increase is not None
        check((self.over is not None) == change, _OVER_GOES_WITH_CHANGE["message"])
        return self


_OVER_IS_COMPARED = rule(
    "self.gates.all(gate, !has(gate.over) || gate.over == 'baseline' || (gate.over != 'checkpoints' && gate.over in self.compareWith))",
    "over of every gate must be baseline or a job of compareWith",
)
_STEPS_ARE_CHECKPOINTS = rule(
    "!('checkpoints' in self.compareWith) || self.compareWith.all(name, !name.matches('^step-[0-9]+$'))",
    "compareWith: beside checkpoints step-N is the checkpoint of a step, so leave the job of such a name out, or checkpoints",
)


class EvaluationPlan(SpecModel):
    """How the tuned model is measured beside the untuned one, and what it must reach to be published."""

    model_config = ConfigDict(json_schema_extra=rules(_OVER_IS_COMPARED, _STEPS_ARE_CHECKPOINTS))

    suites: Annotated[tuple[Suite, ...], Field(max_length=16, json_schema_extra=BY_NAME), AfterValidator(check_names_distinct)] = ()
    """What is measured besides the loss on validation and test data."""
    compare_with: Annotated[
        tuple[Comparison, ...], Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "set"}), AfterValidator(check_distinct)
    ] = ("baseline",)
    """What the results are set beside: baseline, which is the untuned model and always measured; checkpoints, which are this job's own
    before the one that is measured, as far as checkpoint.keep has kept them; and other jobs of the same output.storage by name. Jobs called
    baseline or checkpoints cannot be compared with. There is room for 8 in all: of more checkpoints those with the lowest validation loss
    are taken."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence of the intervals that results and gates are given with."""
    gates: Annotated[tuple[Gate, ...], Field(max_length=16)] = ()
    """Bounds that the tuned model must keep; nothing is published while one is not passed."""
    on_gate_failure: Literal["hold", "fail", "tryEarlierCheckpoint"] = "hold"
    """What follows when a gate is not passed: hold publishes nothing and keeps the artifacts aside in output.storage, fail keeps
    no artifacts (checkpoints stay, as checkpoint.keep says), tryEarlierCheckpoint publishes the best earlier checkpoint that passes all
    gates, and holds where none does."""

    @model_validator(mode="after")
    def _over_is_compared(self) -> Self:
        named = {gate.over for gate in self.gates} - {None}
        check(named <= {BASELINE, *self.other_jobs}, _OVER_IS_COMPARED["message"])
        return self

    @model_validator(mode="after")
    def _steps_are_checkpoints(self) -> Self:
        steps = any(re.fullmatch(r"step-[0-9]+", name) for name in self.compare_with)
        check(not (steps and EARLIER in self.compare_with), _STEPS_ARE_CHECKPOINTS["message"])
        return self

    @property
    def other_jobs(self) -> tuple[str, ...]:
        """The names of the jobs in compareWith, in their order."""
        return tuple(name for name in self.compare_with if name not in (BASELINE, EARLIER))

    @property
    def metric_names(self) -> frozenset[str]:
        """What the suites measure, as suite/metric or suite/task."""
        return frozenset(name for suite in self.suites for name in suite.metric_names)

    def suite(self, name: str) -> Suite | None:
        """The suite of that name, where there is one."""
        return next((suite for suite in self.suites if suite.name == name), None)
