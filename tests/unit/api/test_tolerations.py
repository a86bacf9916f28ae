"""Whether one toleration tolerates all that another does: compared taint by taint, as a scheduler would find out."""

from itertools import product

import pytest

from finetune_api.compute import Toleration, covers

EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
TAINTS = tuple(product(("gpu", "pool", "other"), ("", "x", "y", "z"), EFFECTS))
"""Key, value and effect: also a key and a value that no toleration below names."""


def tolerates(toleration: Toleration, taint: tuple[str, str, str]) -> bool:
    """Kubernetes' documentation, "Taints and Tolerations": what each part of a toleration asks of a taint."""
    key, value, effect = taint
    if toleration.effect and toleration.effect != effect:
        return False
    if toleration.key and toleration.key != key:
        return False
    return toleration.operator == "Exists" or (toleration.value or "") == value


ALL = tuple(
    Toleration(key=key, operator=operator, value=value, effect=effect)
    for (key, operator, value), effect in product(
        [(None, "Exists", None), *((key, *match) for key in ("gpu", "pool") for match in [("Exists", None), ("Equal", None)])]
        + [("gpu", "Equal", value) for value in ("", "x", "y")],
        (None, *EFFECTS),
    )
)


def test_one_covers_another_where_it_tolerates_each_of_its_taints():
    covered = 0
    for wider, other in product(ALL, ALL):
        theirs = [taint for taint in TAINTS if tolerates(other, taint)]
        assert theirs
        assert covers(wider, other) == all(tolerates(wider, taint) for taint in theirs), (wider, other)
        covered += covers(wider, other)
    assert len(ALL) < covered < len(ALL) ** 2


EVERYTHING = {"operator": "Exists"}
GPU = {"key": "gpu", "operator": "Exists"}


@pytest.mark.parametrize(
    ("wider", "other", "covered"),
    [
        (GPU, {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}, True),
        (GPU, {"key": "gpu", "value": "h100"}, True),
        ({"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}, GPU, False),
        ({"key": "gpu", "value": "h100"}, GPU, False),
        ({"key": "gpu", "value": "h100"}, {"key": "gpu", "value": "a100"}, False),
        ({"key": "gpu"}, {"key": "gpu", "value": ""}, True),
        (GPU, {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists", "effect": "NoSchedule"}, False),
        (GPU, EVERYTHING, False),
        (EVERYTHING, EVERYTHING, True),
        (EVERYTHING, GPU, True),
        ({"operator": "Exists", "effect": "NoSchedule"}, EVERYTHING, False),
        ({**GPU, "effect": "NoExecute", "tolerationSeconds": 5}, {**GPU, "effect": "NoExecute"}, True),
    ],
)
def test_what_a_platform_means_by_its_list(wider, other, covered):
    assert covers(Toleration.model_validate(wider), Toleration.model_validate(other)) is covered
