"""How the client asks a head how far it is, and what it makes of the answers."""
# ruff: noqa: F811 - the fixtures of the other file are arguments here

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.unit.operator_edges.test_cluster import FakeServer, calls, cluster, server  # noqa: F401 - fixtures

from finetune_api.report import Report
from finetune_operator.cluster import KubernetesCluster
from finetune_operator.heads import REPORT_BYTES
from finetune_operator.observed import Pod


def head(ip: str | None = "127.0.0.1") -> Pod:
    return Pod("bot-1-head", "team", "p-1", "head", 1, "Running", datetime(2026, 1, 1, tzinfo=UTC), ip)


async def test_report_is_fetched_with_the_attempts_token(server: FakeServer, cluster: KubernetesCluster) -> None:
    report = Report(job_uid="u-1", attempt=1, revision=4, message="trains")
    server.will("GET", "/report", (200, report.to_json()))
    assert await cluster.fetch_report(head(), "attempt-token", 3, 0.5) == report
    (asked,) = server.asked
    assert asked.query == {"after": "3", "wait": "0.5"}
    assert asked.headers["Authorization"] == "Bearer attempt-token"
    assert asked.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    "answer",
    [(401, {}), (500, {}), (302, b""), (200, b"not a report"), (200, b"x" * (REPORT_BYTES + 1))],
    ids=["unauthorized", "error", "redirect", "nonsense", "too large"],
)
async def test_head_that_makes_no_sense_reports_nothing(server: FakeServer, cluster: KubernetesCluster, answer: tuple[int, Any]) -> None:
    server.will("GET", "/report", answer)
    server.will("GET", "/elsewhere", (200, Report(job_uid="u-1", attempt=1).to_json()))
    assert await cluster.fetch_report(head(), "t", 0, 0) is None
    assert [asked.path for asked in server.asked] == ["/report"], "a redirect must not be followed"


async def test_head_that_cannot_be_reached_reports_nothing(cluster: KubernetesCluster, server: FakeServer) -> None:
    assert await cluster.fetch_report(head(ip=None), "t", 0, 0) is None
    nobody = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.2", server.port)
    async with nobody:
        assert await cluster.fetch_report(head(ip="127.0.0.2"), "t", 0, 0) is None
    assert await cluster.fetch_report(head(ip="127.0.0.3"), "t", 0, 0) is None
    assert not server.asked
