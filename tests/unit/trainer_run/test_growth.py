"""When an elastic job begins again with more workers."""

import pytest

from finetune_api.v1alpha1 import Compute
from finetune_trainer import ray_cluster
from finetune_trainer.ray_cluster import SETTLE_SECONDS, Growth, processes_of


class Nodes:
    """The cluster and the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.joined, self.seconds = 1, 50.0
        monkeypatch.setattr(ray_cluster, "nodes_joined", lambda: self.joined)
        monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: self.seconds)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    return Nodes(monkeypatch)


def compute(fewest: int, most: int, gpus: int = 0) -> Compute:
    resources = {"nvidia.com/gpu": gpus} if gpus else {}
    return Compute.model_validate({"workers": {"min": fewest, "max": most}, "resourcesPerWorker": {"cpu": 8, "memory": "1Gi", **resources}})


def test_workers_that_joined_and_stayed_are_a_reason_to_begin_again(nodes: Nodes) -> None:
    growth = Growth(compute(1, 4, gpus=2))
    assert processes_of(compute(1, 4, gpus=2)) == 2
    assert not growth.is_due(processes=2)
    nodes.joined = 2
    assert not growth.is_due(processes=2)
    nodes.seconds += SETTLE_SECONDS + 1
    assert growth.is_due(processes=2)
    assert not growth.is_due(processes=4)  # all of them take part now


def test_one_that_leaves_again_is_not(nodes: Nodes) -> None:
    growth = Growth(compute(1, 4))
    nodes.joined = 2
    assert not growth.is_due(processes=1)
    nodes.joined = 1
    nodes.seconds += SETTLE_SECONDS + 1
    assert not growth.is_due(processes=1)
    nodes.joined = 2
    assert not growth.is_due(processes=1)


@pytest.mark.parametrize(("fewest", "most", "processes"), [(2, 2, 2), (1, 3, 3), (2, 3, 0)])
def test_a_job_that_cannot_grow_does_not_ask(monkeypatch: pytest.MonkeyPatch, nodes: Nodes, fewest: int, most: int, processes: int) -> None:
    """Not elastic, all there, and nobody has begun yet."""
    monkeypatch.setattr(ray_cluster, "nodes_joined", lambda: pytest.fail("Ray was asked"))
    growth = Growth(compute(fewest, most))
    assert not growth.is_due(processes)
    nodes.seconds += SETTLE_SECONDS + 1
    assert not growth.is_due(processes)
