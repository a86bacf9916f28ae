"""The client against an API server of a few lines, which remembers what it was asked and answers as it is told."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from finetune_api.status import Condition, Status
from finetune_operator.cluster import ApiError, KubernetesCluster, connect, event_manifest
from finetune_operator.port import Conflict, Event, JobKey, Refused, TooLarge

JOB = {"metadata": {"name": "bot", "namespace": "team", "uid": "u-1", "resourceVersion": "7"}, "spec": {"x": 1}}
KEY = JobKey("team", "bot")
JOBS = "/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs"
PROFILES = "/apis/finetune.dev/v1alpha1/tuningprofiles"


@dataclass
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class FakeServer:
    """Answers by method and path; 404 for everything that it was not told of."""

    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    answers: dict[tuple[str, str], list[tuple[int, Any]]] = field(default_factory=dict)
    """The last answer is given again and again."""

    def will(self, method: str, path: str, *answers: tuple[int, Any]) -> None:
        self.answers[method, path] = list(answers)

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        query, headers = dict(request.query), dict(request.headers)
        self.asked.append(Asked(request.method, request.path, query, headers, json.loads(body) if body else None))
        answers = self.answers.get((request.method, request.path), [(404, {"reason": "NotFound", "message": "not there"})])
        status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, bytes):
            return web.Response(status=status, body=answer, headers={"Location": "/elsewhere"})
        return web.json_response(answer, status=status)


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    fake.will("GET", PROFILES, (200, {"items": []}))
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.port = runner.addresses[0][1]
    yield fake
    await runner.cleanup()


@pytest.fixture
async def calls() -> list[tuple[str, int]]:
    return []


@pytest.fixture
async def cluster(
    server: FakeServer, calls: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[KubernetesCluster]:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.port}"}}],
        "users": [{"name": "u", "user": {"token": "secret-token"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    async with connect(server.port, lambda verb, code, _: calls.append((verb, code))) as made:
        yield made


def a_pod(uid: str, phase: str, created: str = "2026-01-01T00:00:00Z", **meta: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": uid, "uid": uid, "creationTimestamp": created, **meta},
        "spec": {"nodeName": "n-1"},
        "status": {"phase": phase},
    }


def new_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def test_read_asks_three_times_and_for_events_of_pods_that_are_stuck_on_a_node(
    server: FakeServer, cluster: KubernetesCluster
) -> None:
    pods = [a_pod("p-1", "Running"), a_pod("p-2", "Pending"), a_pod("p-3", "Pending", created=new_now())]
    pods.append({**a_pod("p-4", "Pending"), "spec": {}})
    event = {"involvedObject": {"uid": "p-2"}, "message": "no node"}
    server.will("GET", f"{JOBS}/bot", (200, JOB))
    server.will("GET", "/api/v1/namespaces/team/pods", (200, {"items": pods}))
    server.will("GET", "/api/v1/namespaces/team/configmaps", (200, {"items": [{"metadata": {"name": "bot-1"}}]}))
    server.will("GET", "/api/v1/namespaces/team/events", (200, {"items": [event]}))

    raw = await cluster.read(KEY)

    assert raw is not None
    assert (raw.job, raw.pods, raw.events) == (JOB, pods, [event])
    assert raw.config_maps == [{"metadata": {"name": "bot-1"}}]
    assert len([asked for asked in server.asked if asked.path != PROFILES]) == 4
    queries = {asked.path.rsplit("/", 1)[1]: asked.query for asked in server.asked}
    assert queries["pods"] == queries["configmaps"] == {"labelSelector": "finetune.dev/job-uid=u-1", "resourceVersion": "0"}
    assert queries["events"] == {"fieldSelector": "involvedObject.uid=p-2"}
    config_maps = next(asked for asked in server.asked if asked.path.endswith("configmaps"))
    assert "PartialObjectMetadataList" in config_maps.headers["Accept"]
    assert all(asked.headers["Authorization"] == "Bearer secret-token" for asked in server.asked)


RUNNING = {"attempt": {"number": 2, "startTime": "2026-01-01T00:00:00Z"}}
ENDED = {"attempt": {"number": 2, "startTime": "2026-01-01T00:00:00Z", "endTime": "2026-01-01T00:01:00Z"}}
FAILED = {
    "type": "Failed",
    "status": "True",
    "reason": "Unknown",
    "message": "",
    "observedGeneration": 1,
    "lastTransitionTime": "2026-01-01T00:01:00Z",
}


@pytest.mark.parametrize("owned", [True, False])
async def test_a_head_that_the_cached_list_lacks_is_asked_for_by_name(server: FakeServer, cluster: KubernetesCluster, owned: bool) -> None:
    labels = {"finetune.dev/job-uid": "u-1" if owned else "u-2"}
    head = a_pod("bot-2-head", "Running", labels=labels)
    server.will("GET", f"{JOBS}/bot", (200, {**JOB, "status": RUNNING}))
    server.will("GET", "/api/v1/namespaces/team/pods", (200, {"items": None}))
    server.will("GET", "/api/v1/namespaces/team/configmaps", (200, {"items": None}))
    server.will("GET", "/api/v1/namespaces/team/pods/bot-2-head", (200, head))

    raw = await cluster.read(KEY)

    assert raw is not None
    assert raw.pods == ([head] if owned else [])


async def test_between_attempts_nothing_is_read_from_the_cache(server: FakeServer, cluster: KubernetesCluster) -> None:
    for path in ("pods", "configmaps"):
        server.will("GET", f"/api/v1/namespaces/team/{path}", (200, {"items": []}))
    for status, cached in ((ENDED, False), ({**ENDED, "conditions": [FAILED]}, True)):
        server.asked.clear()
        server.will("GET", f"{JOBS}/bot", (200, {**JOB, "status": status}))
        await cluster.read(KEY)
        lists = [asked for asked in server.asked if "labelSelector" in asked.query]
        assert [asked.query.get("resourceVersion") for asked in lists] == ["0" if cached else None] * 2


async def test_read_of_an_absent_job_is_none(cluster: KubernetesCluster) -> None:
    assert await cluster.read(KEY) is None


async def test_status_is_written_whole_against_the_version_that_was_read(server: FakeServer, cluster: KubernetesCluster) -> None:
    server.will("PUT", f"{JOBS}/bot/status", (200, {**JOB, "written": True}))
    condition = Condition(
        type="Ready", status="False", observed_generation=1, last_transition_time="2026-01-01T00:00:00Z", reason="Pending"
    )

    assert await cluster.patch_status(JOB, Status(observed_generation=1, phase="Pending", conditions=(condition,))) == {
        **JOB,
        "written": True,
    }

    (asked,) = server.asked
    assert asked.query == {"fieldManager": "finetune-operator"}
    assert asked.body["metadata"] == {"name": "bot", "namespace": "team", "uid": "u-1", "resourceVersion": "7"}
    assert "spec" not in asked.body
    assert asked.body["status"]["phase"] == "Pending"
    assert "message" not in asked.body["status"]["conditions"][0], "Debian's API server 1.20 takes an empty string in a list for a null"
    assert "failure" not in asked.body["status"]


@pytest.mark.parametrize(("status", "reason"), [(409, "Conflict"), (404, "NotFound")])
async def test_status_of_a_job_that_changed_or_went_is_a_conflict(
    server: FakeServer, cluster: KubernetesCluster, status: int, reason: str
) -> None:
    server.will("PUT", f"{JOBS}/bot/status", (status, {"reason": reason, "message": "modified"}))
    with pytest.raises(Conflict):
        await cluster.patch_status(JOB, Status())


@pytest.mark.parametrize(
    ("status", "words"),
    [(500, "etcdserver: request is too large"), (413, "limit is 3145728"), (500, "rpc error: trying to send too large")],
)
async def test_status_that_the_job_has_no_room_for_is_too_large(
    server: FakeServer, cluster: KubernetesCluster, status: int, words: str
) -> None:
    server.will("PUT", f"{JOBS}/bot/status", (status, {"message": words}))
    with pytest.raises(TooLarge, match=words):
        await cluster.patch_status(JOB, Status())


def owned(kind: str, name: str, owner: str = "u-1") -> dict[str, Any]:
    owners = [{"kind": "FineTuneJob", "name": "bot", "uid": owner, "controller": True}]
    meta = {"namespace": "team", "name": name, "uid": f"uid-of-{name}", "labels": {"finetune.dev/job-uid": "u-1"}}
    return {"apiVersion": "v1", "kind": kind, "metadata": {**meta, "ownerReferences": owners}}


EXISTS = (409, {"reason": "AlreadyExists", "message": "there"})
SERVICES = "/api/v1/namespaces/team/services"
PODS = "/api/v1/namespaces/team/pods"


async def test_object_is_created_by_its_manager(server: FakeServer, cluster: KubernetesCluster) -> None:
    server.will("POST", SERVICES, (201, owned("Service", "bot-1")))
    assert await cluster.apply(owned("Service", "bot-1")) == "uid-of-bot-1"
    (asked,) = server.asked
    assert asked.query == {"fieldManager": "finetune-operator"}
    assert asked.body == owned("Service", "bot-1")


@pytest.mark.parametrize("owner", ["u-1", "uid of the attempt's ConfigMap"])
async def test_own_object_that_exists_is_brought_in_line_by_server_side_apply(
    server: FakeServer, cluster: KubernetesCluster, owner: str
) -> None:
    """Also one that belongs to the job, as an earlier operator made it."""
    server.will("POST", SERVICES, EXISTS)
    server.will("GET", f"{SERVICES}/bot-1", (200, owned("Service", "bot-1")))
    server.will("PATCH", f"{SERVICES}/bot-1", (200, {}))
    assert await cluster.apply(owned("Service", "bot-1", owner)) == "uid-of-bot-1"
    asked = server.asked[-1]
    assert asked.query == {"fieldManager": "finetune-operator", "force": "true"}
    assert asked.headers["Content-Type"] == "application/apply-patch+yaml"
    assert asked.body == owned("Service", "bot-1", owner)


async def test_own_pod_that_exists_stays_as_it_is(server: FakeServer, cluster: KubernetesCluster) -> None:
    server.will("POST", PODS, EXISTS)
    server.will("GET", f"{PODS}/bot-1-head", (200, owned("Pod", "bot-1-head")))
    await cluster.apply(owned("Pod", "bot-1-head"))
    assert [asked.method for asked in server.asked] == ["POST", "GET"]


@pytest.mark.parametrize(
    "existing",
    [owned("Pod", "bot-1-head", owner="u-0"), {"metadata": {"name": "bot-1-head", "uid": "x"}}],
    ids=["of a deleted job of the same name", "of a user"],
)
async def test_object_of_somebody_else_is_never_touched(server: FakeServer, cluster: KubernetesCluster, existing: dict[str, Any]) -> None:
    server.will("POST", PODS, EXISTS)
    server.will("GET", f"{PODS}/bot-1-head", (200, existing))
    with pytest.raises(Refused, match="Pod team/bot-1-head: one that is not this job's exists"):
        await cluster.apply(owned("Pod", "bot-1-head"))
    assert [asked.method for asked in server.asked] == ["POST", "GET"]


async def test_secret_is_created_and_one_that_exists_is_left_alone(server: FakeServer, cluster: KubernetesCluster) -> None:
    server.will("POST", "/api/v1/namespaces/team/secrets", (201, owned("Secret", "bot-1-c0ffee00")), EXISTS)
    await cluster.apply(owned("Secret", "bot-1-c0ffee00"))
    await cluster.apply(owned("Secret", "bot-1-c0ffee00"))
    assert [asked.method for asked in server.asked] == ["POST", "POST"]


@pytest.mark.parametrize("status", [400, 403, 404, 422])
async def test_object_that_the_cluster_does_not_want_is_refused_in_its_words(
    server: FakeServer, cluster: KubernetesCluster, status: int
) -> None:
    words = 'pods "bot-1-head" is forbidden: exceeded quota: gpus, requested: pods=1, used: pods=4, limited: pods=4'
    server.will("POST", PODS, (status, {"reason": "Forbidden", "message": words}))
    with pytest.raises(Refused) as refused:
        await cluster.apply(owned("Pod", "bot-1-head"))
    assert refused.value.reason == "Forbidden"
    assert refused.value.message == f"cannot create Pod team/bot-1-head: {words}"


async def test_quota_that_others_count_against_too_is_tried_again_and_not_told_as_a_refusal(
    server: FakeServer, cluster: KubernetesCluster
) -> None:
    words = 'Operation cannot be fulfilled on resourcequotas "gpus": the object has been modified; please apply your changes to the latest'
    server.will("POST", PODS, (409, {"reason": "Conflict", "message": words}))
    with pytest.raises(Conflict, match="the object has been modified"):
        await cluster.apply(owned("Pod", "bot-1-head"))


async def test_delete_names_uid_and_grace_and_absence_is_no_error(server: FakeServer, cluster: KubernetesCluster) -> None:
    await cluster.delete("Pod", "team", "bot-1-head", uid="p-1", grace=0)
    server.will("DELETE", f"{PODS}/bot-1-worker-0", (409, {"reason": "Conflict", "message": "another UID"}))
    await cluster.delete("Pod", "team", "bot-1-worker-0", uid="p-2")
    await cluster.delete_job(JOB)
    first, _, job = (asked.body for asked in server.asked)
    assert first == {"propagationPolicy": "Background", "preconditions": {"uid": "p-1"}, "gracePeriodSeconds": 0}
    assert job["preconditions"] == {"uid": "u-1"}


async def test_delete_by_name_spares_what_no_job_owns(server: FakeServer, cluster: KubernetesCluster) -> None:
    server.will("GET", f"{SERVICES}/bot-1", (200, owned("Service", "bot-1")), (200, {"metadata": {"uid": "of a user"}}))
    server.will("DELETE", f"{SERVICES}/bot-1", (200, {}))
    await cluster.delete("Service", "team", "bot-1")
    await cluster.delete("Service", "team", "bot-1")
    await cluster.delete("NetworkPolicy", "team", "bot-1")
    assert [asked.method for asked in server.asked] == ["GET", "DELETE", "GET", "GET"]
    assert server.asked[1].body["preconditions"] == {"uid": "uid-of-bot-1"}


async def test_event_that_was_told_already_or_cannot_be_is_no_error(
    server: FakeServer, cluster: KubernetesCluster, caplog: pytest.LogCaptureFixture
) -> None:
    path = "/api/v1/namespaces/team/events"
    server.will("POST", path, (409, {"reason": "AlreadyExists"}), (403, {"reason": "Forbidden", "message": "no rights"}))
    event = Event("bot.1", "Normal", "Training", "attempt 1 trains")
    await cluster.emit(JOB, event)
    assert not caplog.records
    await cluster.emit(JOB, event)
    assert "no rights" in caplog.text


def test_event_tells_of_the_job() -> None:
    event = event_manifest(JOB, Event("bot.1", "Warning", "OOMKilled", "m" * 2000), datetime(2026, 1, 1, tzinfo=UTC))
    assert event["metadata"] == {"name": "bot.1", "namespace": "team", "labels": {"finetune.dev/job-name": "bot"}}
    assert event["involvedObject"]["uid"] == "u-1"
    assert event["firstTimestamp"] == "2026-01-01T00:00:00Z"
    assert len(event["message"]) == 1024, "the API server refuses longer ones"


async def test_read_is_tried_again_and_a_create_is_not(
    server: FakeServer, cluster: KubernetesCluster, calls: list[tuple[str, int]]
) -> None:
    server.will("GET", JOBS, (503, {"reason": "ServiceUnavailable"}), (200, {"items": []}))
    assert await cluster.jobs("team") == []
    assert len(server.asked) == 2
    server.asked.clear()
    server.will("POST", "/api/v1/namespaces/team/secrets", (503, {"reason": "ServiceUnavailable", "message": "later"}))
    with pytest.raises(ApiError, match="cannot create Secret team/bot-1: later"):
        await cluster.apply(owned("Secret", "bot-1"))
    assert len(server.asked) == 1
    assert calls == [("list", 200), ("create", 503)]


async def test_whether_jobs_can_be_listed_is_asked_in_each_watched_namespace(server: FakeServer, cluster: KubernetesCluster) -> None:
    server.will("GET", JOBS, (200, {"items": [JOB]}))
    await cluster.check(["team"])
    assert server.asked[-1].query == {"limit": "1"}
    with pytest.raises(ApiError, match="not there"):
        await cluster.check(["team", "elsewhere"])


async def test_answer_that_is_not_json_is_told_as_it_is(server: FakeServer, cluster: KubernetesCluster) -> None:
    server.will("GET", f"{JOBS}/bot", (403, b"<html>blocked by a proxy</html>"))
    with pytest.raises(ApiError, match="blocked by a proxy"):
        await cluster.read(KEY)


async def test_login_is_what_kopf_needs(cluster: KubernetesCluster, server: FakeServer) -> None:
    login = await cluster.login()
    assert login["server"] == f"http://127.0.0.1:{server.port}"
    assert (login["scheme"], login["token"]) == ("Bearer", "secret-token")
