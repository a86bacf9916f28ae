"""How the client deletes many pods at once."""
# ruff: noqa: F811 - the fixtures of the other file are arguments here

from tests.unit.operator_edges.test_cluster import PODS, FakeServer, calls, cluster, server  # noqa: F401 - fixtures

from finetune_operator.cluster import KubernetesCluster


async def test_pods_are_deleted_by_their_labels(server: FakeServer, cluster: KubernetesCluster) -> None:
    server.will("DELETE", PODS, (200, {"items": []}))
    await cluster.delete_pods("team", {"a": "1", "b": "2"}, grace=10)
    await cluster.delete_pods("team", {"a": "1"})
    first, second = server.asked
    assert (first.query, first.body) == ({"labelSelector": "a=1,b=2"}, {"propagationPolicy": "Background", "gracePeriodSeconds": 10})
    assert (second.query, second.body) == ({"labelSelector": "a=1"}, {"propagationPolicy": "Background"})
