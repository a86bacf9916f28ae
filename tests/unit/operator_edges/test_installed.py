"""What `helm test` finds wrong, against an operator and an API server of a few lines."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from pydantic import ValidationError

from finetune_api.v1alpha1 import parse_job
from finetune_operator.installed import NOT_A_JOB, TINY, problems

JOBS = "/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs"


@dataclass
class Place:
    """The operator's /readyz and the API server's jobs, on one port."""

    port: int = 0
    ready: int = 200
    refuses: set[str] = field(default_factory=lambda: {"many"})
    """Values of backoffLimit that make the API server refuse a job."""
    status: int = 422
    offered: list[tuple[dict[str, str], Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def readyz(self, _: web.Request) -> web.Response:
        return web.Response(status=self.ready, text="not watching yet")

    async def create(self, request: web.Request) -> web.Response:
        job = await request.json()
        self.offered.append((dict(request.query), job))
        if job["spec"].get("backoffLimit") in self.refuses:
            return web.json_response({"reason": "Invalid", "message": "spec.backoffLimit"}, status=self.status)
        return web.json_response(job, status=201)


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    made = Place()
    app = web.Application()
    app.add_routes([web.get("/readyz", made.readyz), web.post(JOBS, made.create)])
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.port = runner.addresses[0][1]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": made.url}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "current-context": "c",
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    yield made
    await runner.cleanup()


async def found(place: Place) -> list[str]:
    return [problem async for problem in problems(place.url, "team")]


async def test_nothing_is_wrong_and_nothing_is_made(place: Place) -> None:
    assert await found(place) == []
    assert [query["dryRun"] for query, _ in place.offered] == ["All", "All"]
    assert [job["spec"] for _, job in place.offered] == [TINY, NOT_A_JOB]


async def test_an_operator_that_is_not_ready(place: Place) -> None:
    place.ready = 503
    assert await found(place) == ["the operator is not ready: not watching yet"]


async def test_an_operator_that_does_not_answer(place: Place) -> None:
    (problem,) = [problem async for problem in problems("http://127.0.0.1:1", "team")]
    assert problem.startswith("the operator does not answer at http://127.0.0.1:1")


async def test_an_api_server_that_knows_no_jobs(place: Place) -> None:
    place.refuses, place.status = {None, "many"}, 404  # type: ignore[arg-type]
    first, second = await found(place)
    assert first.startswith("the API server takes no job: cannot create FineTuneJob team/helm-test")
    assert second.startswith("the API server does not look at jobs")


async def test_an_api_server_that_takes_everything(place: Place) -> None:
    place.refuses = set()
    assert await found(place) == ["the API server takes a job that is none: the CRD is of another version"]


def test_the_one_is_a_job_and_the_other_is_none() -> None:
    def manifest(spec: dict[str, Any]) -> dict[str, Any]:
        return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "helm-test"}, "spec": spec}

    parse_job(manifest(TINY))
    with pytest.raises((ValueError, ValidationError), match="backoffLimit"):
        parse_job(manifest(NOT_A_JOB))
