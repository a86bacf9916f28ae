"""A profile's queue: no job passes round it by its labels, neither at first nor later, whatever becomes of the profile."""

import json
from dataclasses import replace
from typing import Any

import pytest
from tests.builders import SETTINGS, Clock, make_job, raw_job
from tests.fake_kueue import GROUP, QUEUE
from tests.fakes import FakeCluster, drive
from tests.unit.operator.profile_cases import raw_profile
from tests.unit.operator.test_crash_sweep import QueuedKubelet

from finetune_api.profile import parse_profile
from finetune_api.resolved_profile import ResolvedProfile
from finetune_api.status import Attempt, Resolved, Status
from finetune_operator.plan import desired_objects
from finetune_operator.profiles import snapshot, violations

VOLCANO = "volcano.sh/queue-name"
NAMED = {"profileRef": {"name": "small"}}
BOUNDED: dict[str, Any] = {"queue": "gpu", "allow": {"queues": ["low"]}}


def world(profile: dict[str, Any], labels: dict[str, str], room: int = 2) -> tuple[FakeCluster, QueuedKubelet]:
    """A job of two workers with these labels, and a Kueue with so much room."""
    cluster = FakeCluster(Clock(), raw_job(labels=labels, **NAMED), profiles=[raw_profile(**profile)])
    kubelet = QueuedKubelet(cluster)
    kubelet.kueue.room = room
    return cluster, kubelet


def queues(cluster: FakeCluster) -> dict[str, str | None]:
    """The queue of each pod."""
    return {pod["metadata"]["name"]: pod["metadata"]["labels"].get(QUEUE) for pod in cluster.pods}


def label(cluster: FakeCluster, **labels: str) -> None:
    """The user gives the job these labels, and no others."""
    assert cluster.job is not None
    cluster.job["metadata"]["labels"] = {QUEUE if key == "kueue" else key: value for key, value in labels.items()}


@pytest.mark.parametrize("labels", [{}, {QUEUE: ""}, {"team": "a"}], ids=["none", "empty", "others"])
async def test_a_job_without_a_queue_waits_in_the_profiles(labels: dict[str, str]) -> None:
    cluster, kubelet = world({"queue": "gpu"}, labels, room=0)
    await drive(cluster, kubelet, until=lambda: cluster.status.phase == "Queued")
    assert queues(cluster) == {"bot-1-head": None, "bot-1-worker-0": "gpu", "bot-1-worker-1": "gpu"}
    told = json.loads(cluster.objects["ConfigMap", "bot-1"]["data"]["job.json"])["metadata"]
    assert told["labels"][QUEUE] == "gpu", "the head keeps no time of its own while a queue holds its workers back"
    assert kubelet.trained == []
    kubelet.kueue.room = 2
    await drive(cluster, kubelet)
    assert (cluster.status.phase, kubelet.kueue.used) == ("Complete", ["bot-1-1"])


@pytest.mark.parametrize(
    ("profile", "named", "runs_in"),
    [
        ({"queue": "gpu"}, "any", "any"),
        (BOUNDED, "low", "low"),
        (BOUNDED, "gpu", "gpu"),
        ({"queue": "gpu", "allow": {"queues": []}}, "gpu", "gpu"),
    ],
    ids=["unbounded", "listed", "the profile's own", "the profile's alone"],
)
async def test_the_label_of_the_job_stands_where_it_is_allowed(profile: dict[str, Any], named: str, runs_in: str) -> None:
    cluster, kubelet = world(profile, {QUEUE: named, "kueue.x-k8s.io/priority-class": "low"})
    await drive(cluster, kubelet, until=lambda: kubelet.trained == [1])
    worker = cluster.objects["Pod", "bot-1-worker-0"]["metadata"]["labels"]
    assert (worker[QUEUE], worker["kueue.x-k8s.io/priority-class"], worker[GROUP]) == (runs_in, "low", "bot-1-1")


async def test_a_job_in_a_queue_that_is_not_allowed_is_refused() -> None:
    cluster, kubelet = world(BOUNDED, {QUEUE: "prod"})
    await drive(cluster, kubelet)
    assert cluster.objects == {}
    assert cluster.status.failure is not None
    assert (cluster.status.failure.reason, cluster.status.failure.message) == (
        "ProfileViolated",
        "metadata.labels has kueue.x-k8s.io/queue-name=prod, and the profile small allows gpu, low (queue, allow.queues)",
    )


async def test_a_label_that_is_changed_later_leads_out_of_no_queue() -> None:
    """Each attempt has workers of its own, and the label is looked at for each."""
    cluster, kubelet = world(BOUNDED, {QUEUE: "low"})
    kubelet.total_steps = 100
    let_in = kubelet.kueue.used
    await drive(cluster, kubelet, until=lambda: len(kubelet.trained) == 1)
    cluster.profiles = []
    for labels, runs_in in ({"kueue": "prod"}, "gpu"), ({}, "gpu"), ({"kueue": "low"}, "low"):
        label(cluster, **labels)
        steps, attempt = len(kubelet.trained), len(let_in)
        await drive(cluster, kubelet, until=lambda steps=steps: len(kubelet.trained) == steps + 2)  # type: ignore[misc]
        assert (cluster.status.attempt.number, len(let_in)) == (attempt, attempt), "a label alone ends no attempt"
        kubelet.kueue.preempt()
        kubelet.kueue.room = 2
        await drive(cluster, kubelet, until=lambda attempt=attempt: len(let_in) == attempt + 1)  # type: ignore[misc]
        assert {queue for pod, queue in queues(cluster).items() if "worker" in pod} == {runs_in}
    await drive(cluster, kubelet)
    assert (cluster.status.phase, let_in) == ("Complete", ["bot-1-1", "bot-2-1", "bot-3-1", "bot-4-1"])


async def test_an_operator_that_dies_after_any_write_passes_round_no_queue() -> None:
    """The profile goes while it is away, and the user takes another label: what was written must be enough."""
    undisturbed, calm = world(BOUNDED, {})
    await drive(undisturbed, calm)
    assert calm.kueue.used == ["bot-1-1"]
    points = len(undisturbed.writes)
    assert points > 10
    for write in range(1, points + 1):
        cluster, kubelet = world(BOUNDED, {})
        cluster.crash_after = write
        await drive(cluster, kubelet, until=lambda cluster=cluster: cluster.crash_after is None)  # type: ignore[misc]
        cluster.profiles = []
        label(cluster, kueue="prod")
        await drive(cluster, kubelet)
        assert (cluster.status.phase, kubelet.kueue.used) == ("Complete", ["bot-1-1"]), write
        assert cluster.objects.keys() == undisturbed.objects.keys()


def bound(labels: dict[str, str], **profile: Any) -> tuple[str, ...]:
    """What a profile has against a job's labels."""
    spec = make_job(**NAMED).spec
    assert spec is not None
    parsed = parse_profile(raw_profile(**profile))
    return violations(spec, labels, snapshot(parsed, "named by the job", spec, "team-a", "bot"), parsed)


def test_both_labels_are_bounded_and_long_lists_are_cut() -> None:
    many = [f"q{number}" for number in range(12)]
    assert bound({QUEUE: "q11", VOLCANO: "prod"}, queue="gpu", allow={"queues": many}) == (
        "metadata.labels has volcano.sh/queue-name=prod, and the profile small allows gpu, q0, q1, q2, q3, q4, q5, q6, q7, q8, ... "
        "(queue, allow.queues)",
    )
    assert bound({QUEUE: "any", VOLCANO: "any"}, queue="gpu") == ()
    assert bound({QUEUE: "any", VOLCANO: "any"}) == ()


def begun(kept: ResolvedProfile | None) -> Status:
    """A job whose first attempt wants two workers."""
    return Status(attempt=Attempt(number=1, start_time="2026-01-01T00:00:00Z", gangs=1), workers_wanted=2, resolved=Resolved(profile=kept))


@pytest.mark.parametrize(
    ("scheduler", "labels", "group"),
    [
        ("volcano", {}, {"minMember": 2, "queue": "gpu"}),
        ("volcano", {VOLCANO: "low"}, {"minMember": 2, "queue": "low"}),
        ("volcano", {VOLCANO: "prod"}, {"minMember": 2, "queue": "gpu"}),
        ("scheduler-plugins", {}, {"minMember": 2}),
        ("none", {}, None),
    ],
)
def test_other_schedulers(scheduler: Any, labels: dict[str, str], group: dict[str, Any] | None) -> None:
    parsed = parse_profile(raw_profile(**BOUNDED))
    spec = make_job(**NAMED).spec
    assert spec is not None
    job = make_job(labels=labels, status=begun(snapshot(parsed, "named by the job", spec, "team-a", "bot")), **NAMED)
    made = desired_objects(job, job.status, replace(SETTINGS, gang_scheduler=scheduler))
    assert [each["spec"] for each in made if each["kind"] == "PodGroup"] == ([group] if group else [])
    assert [each["metadata"]["name"] for each in made if each["kind"] == "Pod" and QUEUE in each["metadata"]["labels"]] == []
    assert "labels" not in json.loads(made[0]["data"]["job.json"])["metadata"], "no head is told that Kueue holds its workers back"


def test_a_job_that_an_operator_of_before_let_in_runs_as_it_did() -> None:
    before = {"name": "small", "generation": 1, "allow": {"models": ["hf://org"]}}
    job = make_job(status=begun(ResolvedProfile.model_validate(before)), **NAMED)
    made = desired_objects(job, job.status, SETTINGS)
    assert len([each for each in made if each["kind"] == "Pod"]) == 3
    assert not any(QUEUE in each["metadata"]["labels"] for each in made)
