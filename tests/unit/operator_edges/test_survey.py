"""All jobs at once: which are found to rest, and what is asked of the API server for it."""
# ruff: noqa: F811 - the fixtures of the other file are arguments here

from typing import Any

import pytest
from tests.unit.operator_edges.test_cluster import JOBS, PODS, FakeServer, calls, cluster, server  # noqa: F401 - fixtures

from finetune_operator.cluster import KubernetesCluster
from finetune_operator.port import ApiError, JobKey
from finetune_operator.resting import has_ended_for_good, is_ended_head
from finetune_operator.survey import PAGE, survey

CONFIG_MAPS = "/api/v1/namespaces/team/configmaps"
LABEL = "finetune.dev/job-uid"
ALIVE = "status.phase!=Succeeded,status.phase!=Failed"


def ended(
    name: str = "bot", *, fact: str = "Complete", truth: str = "True", seen: int = 3, attempt: int = 2, **meta: Any
) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "team", "uid": f"u-{name}", "generation": 3, **meta},
        "spec": {"model": {"source": "hf://org/model"}},
        "status": {"observedGeneration": seen, "attempt": {"number": attempt}, "conditions": [{"type": fact, "status": truth}]},
    }


def asks_later(part: str, field: str) -> dict[str, Any]:
    job = ended()
    return {**job, part: {**job[part], field: {}}}


JUDGED: dict[str, tuple[dict[str, Any], bool]] = {
    "complete": (ended(), True),
    "failed": (ended(fact="Failed"), True),
    "with somebody's annotation": (ended(annotations={"example.com/note": "x"}), True),
    "not ended": (ended(truth="False"), False),
    "without a status": ({"metadata": {"name": "bot", "namespace": "team", "uid": "u-1", "generation": 1}, "spec": {}}, False),
    "changed since": (ended(seen=2), False),
    "being deleted": (ended(deletionTimestamp="2026-01-01T00:00:00Z"), False),
    "to be retried": (ended(fact="Failed", annotations={"finetune.dev/retry": "1"}), False),
    "to be deleted after a while": (asks_later("spec", "ttlSecondsAfterFinished"), False),
    "to be measured again": (asks_later("spec", "monitoring"), False),
    "whose measuring has just been taken back": (asks_later("status", "monitoring"), False),
}


@pytest.mark.parametrize(("job", "rests"), JUDGED.values(), ids=JUDGED)
def test_what_a_job_says_of_itself_tells_whether_it_has_ended_for_good(job: dict[str, Any], rests: bool) -> None:
    assert has_ended_for_good(job) is rests


@pytest.mark.parametrize(
    ("role", "phase", "expected"),
    [("head", "Succeeded", True), ("head", "Failed", True), ("head", "Running", False), ("worker", "Failed", False)],
)
def test_a_head_that_has_ended_is_told_from_other_pods(role: str, phase: str, expected: bool) -> None:
    assert is_ended_head({"metadata": {"labels": {"finetune.dev/role": role}}, "status": {"phase": phase}}) is expected


def of(job: str, name: str) -> dict[str, Any]:
    """An object's metadata, with the label of a job."""
    return {"metadata": {"name": name, "namespace": "team", "labels": {LABEL: f"u-{job}"}}}


NAMES = ("rests", "kept-map", "kept-worker", "old-head", "live-head", "no-pod")
LEFT = {
    CONFIG_MAPS: [of("kept-map", "kept-map-2")],
    PODS: [
        of("rests", "rests-2-head"),
        of("kept-map", "kept-map-2-head"),
        of("kept-worker", "kept-worker-2-worker-0"),
        of("old-head", "old-head-1-head"),
        of("live-head", "live-head-2-head"),
    ],
}


def fill(server: FakeServer) -> None:
    """Six jobs that have ended, and one that trains; what is left of them; in one list the API server needs two answers."""
    jobs = [ended(name) for name in NAMES] + [ended("trains", truth="False")]
    server.will("GET", JOBS, (200, {"items": jobs[:2], "metadata": {"continue": "more"}}), (200, {"items": jobs[2:], "metadata": {}}))
    server.will("GET", CONFIG_MAPS, (200, {"items": LEFT[CONFIG_MAPS]}))
    server.will("GET", PODS, (200, {"items": LEFT[PODS]}), (200, {"items": [of("live-head", "live-head-2-head")]}))


async def test_a_job_rests_where_nothing_is_left_but_the_head_that_it_ended_with(server: FakeServer, cluster: KubernetesCluster) -> None:
    fill(server)
    keys, resting = await survey(cluster, ["team"])
    assert keys == {f"u-{name}": JobKey("team", name) for name in (*NAMES, "trains")}
    assert resting == {"u-rests", "u-no-pod"}


async def test_all_jobs_are_a_few_requests_past_the_cache(server: FakeServer, cluster: KubernetesCluster) -> None:
    fill(server)
    await survey(cluster, ["team"])
    limit, selected = {"limit": str(PAGE)}, {"limit": str(PAGE), "labelSelector": LABEL}
    assert [(asked.path, asked.query) for asked in server.asked] == [
        (JOBS, limit),
        (JOBS, {**limit, "continue": "more"}),
        (CONFIG_MAPS, selected),
        (PODS, selected),
        (PODS, {**selected, "fieldSelector": ALIVE}),
    ]
    assert ["PartialObjectMetadataList" in asked.headers["Accept"] for asked in server.asked] == [False, False, True, True, True]


async def test_where_no_job_has_ended_nothing_else_is_asked_for(server: FakeServer, cluster: KubernetesCluster) -> None:
    server.will("GET", "/apis/finetune.dev/v1alpha1/finetunejobs", (200, {"items": None}))
    assert await survey(cluster, []) == ({}, set())
    assert len(server.asked) == 1


async def test_a_list_that_is_refused_is_an_error_and_nobody_rests(server: FakeServer, cluster: KubernetesCluster) -> None:
    fill(server)
    server.will("GET", CONFIG_MAPS, (403, {"reason": "Forbidden", "message": "no"}))
    with pytest.raises(ApiError, match="configmaps"):
        await survey(cluster, ["team"])
