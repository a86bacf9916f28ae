"""The workers that train: how many, with what, on which nodes."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_api.fields import LabelKey, LabelValue, Quantity, ResourceName, SpecModel, check, rule, rules


class Workers(SpecModel):
    """Number of workers; min == max is a fixed size, else the training is elastic. The global batch is the same with any number."""

    model_config = ConfigDict(json_schema_extra=rules(rule("self.min <= self.max", "min must not be larger than max")))

    min: Annotated[int, Field(ge=1, le=1024)] = 1
    """The training starts with no fewer, and goes on with no fewer when some are lost."""
    max: Annotated[int, Field(ge=1, le=1024)] = 1
    """The training asks for so many; when more come than it started with, it saves a checkpoint and goes on with all of them."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError("min must not be larger than max")
        return self


_TOLERATION_RULES = (
    rule("has(self.key) || self.operator == 'Exists'", "without a key the operator must be Exists"),
    rule("!has(self.value) || self.value == '' || self.operator == 'Equal'", "value goes with the operator Equal"),
    rule(
        "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
        "tolerationSeconds goes with the effect NoExecute",
    ),
)


class Toleration(SpecModel):
    """A toleration of the worker pods, as in a Pod."""

    model_config = ConfigDict(json_schema_extra=rules(*_TOLERATION_RULES))

    key: LabelKey | None = None
    """Key of the taint; absent with operator Exists tolerates all."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Exists, or Equal (the value must match)."""
    value: LabelValue | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; absent is every effect."""
    toleration_seconds: Annotated[int, Field(ge=0, le=31536000)] | None = None
    """How long a NoExecute taint is tolerated."""

    @model_validator(mode="after")
    def _as_in_a_pod(self) -> Self:
        keyless, valueless, timeless = (entry["message"] for entry in _TOLERATION_RULES)
        check(self.key is not None or self.operator == "Exists", keyless)
        check(not self.value or self.operator == "Equal", valueless)
        check(self.toleration_seconds is None or self.effect == "NoExecute", timeless)
        return self


def covers(wider: Toleration, other: Toleration) -> bool:
    """Whether `wider` tolerates every taint that `other` does, by the rules by which the scheduler compares a toleration with a taint.

    No key is every key, Exists every value, and no effect every effect. How long a taint is tolerated (tolerationSeconds) is left aside.
    """
    same_key = wider.key is None or wider.key == other.key
    same_value = wider.operator == "Exists" or (other.operator == "Equal" and (wider.value or "") == (other.value or ""))
    return same_key and same_value and (wider.effect is None or wider.effect == other.effect)


_WHOLE_DEVICES = rule(
    "self.all(name, !name.contains('/') || string(self[name]).matches('^[0-9]+$'))",
    "a device such as nvidia.com/gpu is counted in whole numbers",
)


def _check_resources(resources: dict[str, int | str]) -> dict[str, int | str]:
    whole = (str(amount).isdecimal() for name, amount in resources.items() if "/" in name)
    check(all(whole), _WHOLE_DEVICES["message"])
    return resources


Resources = Annotated[
    dict[ResourceName, Quantity],
    Field(max_length=16, json_schema_extra=rules(_WHOLE_DEVICES)),
    AfterValidator(_check_resources),
]
NodeSelector = Annotated[dict[LabelKey, LabelValue], Field(max_length=16)]
Tolerations = Annotated[tuple[Toleration, ...], Field(max_length=16)]


class Compute(SpecModel):
    """The workers that train."""

    workers: Workers = Workers()
    """Number of workers."""
    resources_per_worker: Resources = {}
    """Requests and limits of each worker, as in a Pod: {nvidia.com/gpu: 1, cpu: 8, memory: 64Gi}."""
    node_selector: NodeSelector = {}
    """Labels of the nodes that may run a worker."""
    tolerations: Tolerations = ()
    """Taints that a worker tolerates."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp holds the whole model on every worker, fsdp shards it over them; auto is fsdp where a worker's memory does not hold it."""
