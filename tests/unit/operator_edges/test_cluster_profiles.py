"""How the client reads profiles: for those jobs alone that have yet to be told their own, and never as if there were none."""
# ruff: noqa: F811 - the fixtures of the other file are arguments here

from typing import Any

import pytest
from tests.unit.operator_edges.test_cluster import JOB, JOBS, KEY, PROFILES, FakeServer, calls, cluster, server  # noqa: F401 - fixtures

from finetune_operator.cluster import ApiError, KubernetesCluster


@pytest.mark.parametrize(
    ("status", "asks"),
    [
        ({}, True),
        ({"resolved": {"trainerImage": "a"}}, True),
        ({"resolved": {"profile": {"name": "small"}}}, False),
        ({"attempt": {"number": 1}}, False),
    ],
)
async def test_profiles_are_read_past_the_cache_until_the_job_has_been_told_its_own(
    server: FakeServer, cluster: KubernetesCluster, status: dict[str, Any], asks: bool
) -> None:
    server.will("GET", f"{JOBS}/bot", (200, {**JOB, "status": status}))
    server.will("GET", PROFILES, (200, {"items": [{"metadata": {"name": "small"}}]}))
    for kind in "pods", "configmaps":
        server.will("GET", f"/api/v1/namespaces/team/{kind}", (200, {"items": []}))
    raw = await cluster.read(KEY)
    assert raw is not None
    assert [profile["metadata"]["name"] for profile in raw.profiles] == (["small"] if asks else [])
    assert [asked.query for asked in server.asked if asked.path == PROFILES] == ([{}] if asks else [])


async def test_a_job_is_not_begun_while_the_profiles_cannot_be_read(server: FakeServer, cluster: KubernetesCluster) -> None:
    server.will("GET", f"{JOBS}/bot", (200, JOB))
    server.will("GET", PROFILES, (403, {"reason": "Forbidden", "message": "not yours"}))
    for kind in "pods", "configmaps":
        server.will("GET", f"/api/v1/namespaces/team/{kind}", (200, {"items": []}))
    with pytest.raises(ApiError, match="not yours"):
        await cluster.read(KEY)
