"""The space that a search looks through, and the jobs that its points stand for. Pure."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_api.evaluation import EARLIER
from finetune_api.reasons import Reason
from finetune_api.search import SEARCHABLE, SearchPlan
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.errors import JobError

Scalar = bool | int | float | str
Values = Mapping[str, Scalar]
"""A value for each parameter, by the path of its field: training.learningRate."""
SEARCHED = ("method", "objective", "training")
"""The parts of a spec whose fields can be searched for."""


@dataclass(frozen=True)
class Dimension:
    """The values of one parameter: a choice, or the numbers between two ends, both included."""

    path: str
    choices: tuple[Scalar, ...] = ()
    low: float = 0.0
    high: float = 0.0
    logarithmic: bool = False
    """Whether the logarithms of the numbers are each as likely, instead of the numbers."""
    whole: bool = False
    """Whether only whole numbers are meant."""

    @property
    def size(self) -> int | None:
        """How many values there are; None where they cannot be counted."""
        if self.choices:
            return len(self.choices)
        return int(self.high) - int(self.low) + 1 if self.whole else None

    def at(self, share: float) -> Scalar:
        """The value below which this share of the probability lies; `share` is from 0 to less than 1."""
        if self.choices:
            return self.choices[int(share * len(self.choices))]
        low, high = self.low, self.high + (1 if self.whole else 0)
        number = low * (high / low) ** share if self.logarithmic else low + (high - low) * share
        return min(math.floor(number), int(self.high)) if self.whole else min(max(number, self.low), self.high)

    def all(self) -> tuple[Scalar, ...]:
        """Every value, where they can be counted."""
        return self.choices or tuple(range(int(self.low), int(self.high) + 1))


@dataclass(frozen=True)
class SearchSpace:
    """The parameters, in the order of their paths: what is drawn does not depend on how the manifest was written."""

    dimensions: tuple[Dimension, ...]

    @property
    def size(self) -> int | None:
        """How many points there are; None where they cannot be counted."""
        sizes = [dimension.size for dimension in self.dimensions]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def at(self, shares: tuple[float, ...]) -> Values:
        """The point at these shares of each dimension's probability."""
        return {dimension.path: dimension.at(share) for dimension, share in zip(self.dimensions, shares, strict=True)}

    def grid(self) -> Iterator[Values]:
        """Every point, where they can be counted; the last parameter changes fastest."""
        paths = [dimension.path for dimension in self.dimensions]
        for point in itertools.product(*(dimension.all() for dimension in self.dimensions)):
            yield dict(zip(paths, point, strict=True))


def space_of(plan: SearchPlan) -> SearchSpace:
    """The space that a search's parameters span. A value that stands twice in a choice counts once."""
    dimensions = []
    for path, values in sorted(plan.parameters.items()):
        if values.choice is not None:
            dimensions.append(Dimension(path, choices=tuple(dict.fromkeys(values.choice))))
        else:
            low, high = values.ends
            dimensions.append(Dimension(path, (), low, high, values.log_uniform is not None, SEARCHABLE[path].whole))
    return SearchSpace(tuple(dimensions))


def trials_of(plan: SearchPlan) -> int:
    """How many trials there are: as many as are asked for, or as there are points."""
    size = space_of(plan).size
    return plan.trials if size is None else min(plan.trials, size)


def with_values(job: FineTuneJob, values: Values, changes: Mapping[str, Any] | None = None) -> FineTuneJob:
    """The job with these values in their fields, checked as a whole. `changes` are other parts of the spec, as JSON by path.

    Raises JobError (InvalidSpec) where the values do not go together.
    """
    manifest = job.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"status"})
    for path, value in {**(changes or {}), **values}.items():
        *parents, field = path.split(".")
        part = manifest["spec"]
        for parent in parents:
            part = part.setdefault(parent, {})
        part[field] = value
    try:
        return parse_job(manifest, local=True)  # what is allowed to local runs alone was checked when the job began
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3])
        raise JobError(Reason.INVALID_SPEC, f"search.parameters: {told(values)} do not go together: {faults}") from None


def trial_job(job: FineTuneJob, values: Values, compute: Mapping[str, Any] | None = None) -> FineTuneJob:
    """The job that a trial runs: its values, search.epochs, one checkpoint, no search; on `compute`, where that is not the job's own.

    No earlier checkpoint of a trial is judged, so none is measured for that.

    Raises JobError (InvalidSpec) where the values do not go together, on all workers too: what cannot be trained to the end is not tried.
    """
    epochs = {"training.epochs": job.spec.search.epochs} if job.spec.search and job.spec.search.epochs else {}
    compared = [name for name in job.spec.evaluation.compare_with if name != EARLIER]
    judged = {"evaluation.compareWith": compared, "evaluation.onGateFailure": "hold"}
    whole = with_values(job, values, {"checkpoint.keep": 1, "search": None, **judged, **epochs})
    return whole if compute is None else with_values(whole, {}, {"compute": dict(compute)})


def roomiest(job: FineTuneJob) -> FineTuneJob:
    """The job with the most virtual tokens that its search may try: the prepared examples, which all trials share, leave room for them."""
    parameters = job.spec.search.parameters if job.spec.search else {}
    most = {path: max(map(float, values.values)) for path, values in parameters.items() if path.endswith(".numVirtualTokens")}
    return with_values(job, {path: int(value) for path, value in most.items()}) if most else job


def check_comparable(plan: SearchPlan) -> None:
    """Raise JobError (InvalidSpec) where the trials' values would not be values of the same measure."""
    changed = [path for path in sorted(plan.parameters) if path.startswith("objective.dpo.")]
    if changed and plan.goal.metric.endswith("/loss") and plan.goal.metric.split("/")[0] in ("validation", "test"):
        what, remedy = f"search.goal.metric: {plan.goal.metric} is another measure with each {changed[0]}", "choose a suite's metric"
        raise JobError(Reason.INVALID_SPEC, f"{what}, so trials cannot be compared by it: {remedy}")
    if changed and plan.pruning == "asha":
        raise JobError(
            Reason.INVALID_SPEC, f"search.pruning: the validation loss is another measure with each {changed[0]}: leave asha out"
        )


def told(values: Values) -> str:
    """Values for people: training.learningRate 0.0002, method.lora.rank 8."""
    return ", ".join(f"{path} {value:.4g}" if isinstance(value, float) else f"{path} {value}" for path, value in sorted(values.items()))


def config_of(config: Mapping[str, Any], job: FineTuneJob) -> dict[str, Any]:
    """Everything that a result follows from, for the job with other values: `config` has model and data, which all trials share."""
    return {
        **config,
        **{part: getattr(job.spec, part).model_dump(mode="json", by_alias=True, exclude_none=True) for part in SEARCHED},
    }
