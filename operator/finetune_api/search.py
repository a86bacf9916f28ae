"""Which values are tried before the training, and what they are judged by."""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from finetune_api.evaluation import GENERATED_METRICS, LOWER_IS_BETTER
from finetune_api.fields import MetricName, SpecModel, check, check_exactly_one, model_in, rule, rules
from finetune_api.methods import Method
from finetune_api.objectives import Objective
from finetune_api.status_fields import AnyScalar, Scalar
from finetune_api.training import Training

_ROOTS: dict[str, type[BaseModel]] = {"training": Training, "method": Method, "objective": Objective}
_NOT_SEARCHED = ("training.seed", "training.maxSequenceLength", "lossOn", "teacher")
"""Fields, or their last names, that the prepared examples follow from; all trials share these."""


@dataclass(frozen=True)
class SearchField:
    """A field of the spec whose value can be searched for."""

    path: str
    model: type[BaseModel]
    name: str
    """Name of the field in the model, in snake case."""

    @property
    def whole(self) -> bool:
        """Whether only whole numbers, and no fractions, are among its values."""
        kinds = _kinds(self.model.model_fields[self.name].annotation)
        return int in kinds and float not in kinds

    def refusal(self, value: Scalar) -> str | None:
        """Why the field does not take the value; None where it does."""
        try:
            _holder(self)(value=value)
        except ValidationError as error:
            return str(error.errors()[0]["msg"])
        return None


def _kinds(annotation: object) -> frozenset[object]:
    """The plain types and Literals that an annotation allows; None is left out."""
    if get_origin(annotation) in (Union, UnionType):
        return frozenset(kind for member in get_args(annotation) for kind in _kinds(member))
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    return frozenset() if annotation is type(None) else frozenset({annotation})


def _searchable(annotation: object) -> bool:
    kinds = _kinds(annotation)
    return bool(kinds) and all(kind in (int, float, bool) or get_origin(kind) is Literal for kind in kinds)


@cache
def _holder(field: SearchField) -> type[BaseModel]:
    """A model with that field alone, as strict as the one that it is from."""
    info = field.model.model_fields[field.name]
    annotation: Any = info.annotation
    return create_model("Holder", __base__=SpecModel, value=(annotation, info))


def _fields(path: str, model: type[BaseModel]) -> Iterator[SearchField]:
    """The searchable fields of a model, and of those inside it."""
    for name, info in model.model_fields.items():
        alias = info.alias or name
        here, inner = f"{path}.{alias}", model_in(info.annotation)
        if here in _NOT_SEARCHED or alias in _NOT_SEARCHED:
            continue
        if inner is not None and all(kind is inner for kind in _kinds(info.annotation)):
            yield from _fields(here, inner)
        elif _searchable(info.annotation):
            yield SearchField(here, model, name)


SEARCHABLE: dict[str, SearchField] = {field.path: field for root, model in _ROOTS.items() for field in _fields(root, model)}
"""Every field that can be searched for, by its path in the spec."""

_Ends = Annotated[
    tuple[float, ...],
    Field(min_length=2, max_length=2, json_schema_extra=rules(rule("self[0] < self[1]", "must be [low, high] with low below high"))),
]


def _check_ends(ends: tuple[float, ...]) -> tuple[float, ...]:
    check(ends[0] < ends[1], "must be [low, high] with low below high")
    return ends


_LOG_OF_POSITIVE = rule("!has(self.logUniform) || self.logUniform[0] > 0.0", "logUniform needs a low end above 0")


class SearchRange(SpecModel):
    """The values that are tried of one field. Exactly one of uniform, logUniform and choice."""

    # CEL does not see `choice`, whose items are of several types.
    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [name]} for name in ("uniform", "logUniform", "choice")], **rules(_LOG_OF_POSITIVE)}
    )

    uniform: Annotated[_Ends, AfterValidator(_check_ends)] | None = None
    """[low, high]: numbers between these, each as likely; whole ones where the field takes no others."""
    log_uniform: Annotated[_Ends, AfterValidator(_check_ends)] | None = None
    """[low, high]: numbers between these whose logarithms are each as likely."""
    choice: (
        Annotated[
            tuple[AnyScalar, ...],
            Field(min_length=1, max_length=32),
        ]
        | None
    ) = None
    """One of these: numbers, words, true or false."""

    @model_validator(mode="after")
    def _one_range(self) -> Self:
        check_exactly_one(self, "uniform", "logUniform", "choice")
        check(self.log_uniform is None or self.log_uniform[0] > 0, _LOG_OF_POSITIVE["message"])
        return self

    @property
    def ends(self) -> tuple[float, ...]:
        """[low, high] of a range of numbers; empty for a choice."""
        return self.uniform or self.log_uniform or ()

    @property
    def values(self) -> tuple[Scalar, ...]:
        """All values of a choice, the ends of a range of numbers; whole ones as integers."""
        return self.choice or tuple(int(end) if end.is_integer() else end for end in self.ends)


_MODE_FITS_METRIC = rule(
    f"self.mode == 'min' ? !self.metric.matches('/({'|'.join(GENERATED_METRICS)}|tokenAccuracy)$') "
    f": !self.metric.matches('/({'|'.join(LOWER_IS_BETTER)})$')",
    "mode must be min for a loss or perplexity and max for the metrics that improve by rising",
)


class SearchGoal(SpecModel):
    """What the trials are judged by."""

    model_config = ConfigDict(json_schema_extra=rules(_MODE_FITS_METRIC))

    metric: MetricName
    """Metric of a suite as suite/metric, validation/loss, validation/perplexity, or with data.test test/loss and test/perplexity."""
    mode: Literal["min", "max"]
    """Whether the smallest or the largest value is best."""

    @model_validator(mode="after")
    def _mode_fits_metric(self) -> Self:
        metric = self.metric.split("/", 1)[1]
        wrong = (*GENERATED_METRICS, "tokenAccuracy") if self.mode == "min" else LOWER_IS_BETTER
        check(metric not in wrong, _MODE_FITS_METRIC["message"])
        return self


_PATHS_EXIST = rule(
    f"self.all(path, path in {sorted(SEARCHABLE)})",
    "every key must be the path of a number or a choice in training, method or objective, such as training.learningRate; "
    "what the examples follow from (seed, maxSequenceLength, lossOn, the teacher) is not searched for",
)


def _meant(path: str) -> str:
    near = get_close_matches(path, SEARCHABLE, n=1)
    return f"; {near[0]} would be one" if near else ""


def _check_parameters(parameters: dict[str, SearchRange]) -> dict[str, SearchRange]:
    """Every path names a field, which takes every value. Raises ValueError."""
    for path, values in parameters.items():
        if path not in SEARCHABLE:
            raise ValueError(f"{path}: {_PATHS_EXIST['message']}{_meant(path)}")
        for value in values.values:
            refusal = SEARCHABLE[path].refusal(value)
            check(refusal is None, f"{path} does not take {value}: {refusal}")
    return parameters


_GRID_NEEDS_CHOICES = rule(
    "self.algorithm != 'grid' || self.parameters.all(path, !has(self.parameters[path].uniform) && !has(self.parameters[path].logUniform))",
    "algorithm grid needs a choice for every parameter",
)
_EPOCHS_ONCE = rule("!has(self.epochs) || !('training.epochs' in self.parameters)", "epochs does not go with the parameter training.epochs")


class SearchPlan(SpecModel):
    """Trials of other values, the best of which are trained to the end."""

    model_config = ConfigDict(json_schema_extra=rules(_GRID_NEEDS_CHOICES, _EPOCHS_ONCE))

    parameters: Annotated[
        dict[str, SearchRange],
        Field(min_length=1, max_length=8, json_schema_extra=rules(_PATHS_EXIST)),
        AfterValidator(_check_parameters),
    ]
    """The values that are tried, by the path of their field: {training.learningRate: {logUniform: [1e-5, 1e-3]}}. Any number or choice of
    training, method and objective can be searched for, but for what the examples follow from."""
    trials: Annotated[int, Field(ge=1, le=1000)] = 8
    """Trials at most; a grid may have fewer."""
    parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Trials at a time; the workers are shared among them."""
    algorithm: Literal["random", "grid", "tpe"] = "tpe"
    """How values are chosen: at random, all combinations in turn, or by what earlier trials came to (Bergstra et al. 2011)."""
    pruning: Literal["none", "asha"] = "none"
    """asha stops trials early whose validation loss falls behind (Li et al. 2020)."""
    goal: SearchGoal = SearchGoal(metric="validation/loss", mode="min")
    """What the trials are judged by."""
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Epochs of a trial; absent is training.epochs."""

    @model_validator(mode="after")
    def _fits_algorithm(self) -> Self:
        chosen = all(values.choice is not None for values in self.parameters.values())
        check(self.algorithm != "grid" or chosen, _GRID_NEEDS_CHOICES["message"])
        check(self.epochs is None or "training.epochs" not in self.parameters, _EPOCHS_ONCE["message"])
        return self
