"""A job's life under a profile: chosen once, kept whatever becomes of the profile, refused or waiting where it must be."""

import json
from dataclasses import replace

import pytest
from tests.builders import SETTINGS, Clock, raw_job
from tests.fakes import KEY, FakeCluster, FakeKubelet, drive
from tests.unit.operator.profile_cases import raw_profile

from finetune_operator.reconcile import reconcile
from finetune_operator.words import monitoring_lines

OFFER = {
    "trainerImage": "registry.example/own:1",
    "head": {"cpu": 4, "memory": "8Gi"},
    "compute": {"nodeSelector": {"pool": "h100"}, "resourcesPerWorker": {"nvidia.com/gpu": 1}},
    "output": {"storage": "pvc://tuned/{namespace}/{name}"},
}
NAMED = {"profileRef": {"name": "small"}, "output": {}}


def cluster_with(*profiles, **spec):
    """A cluster with these profiles and a job."""
    return FakeCluster(Clock(), raw_job(**spec), profiles=list(profiles))


async def look(cluster, settings=SETTINGS):
    """One turn of the job."""
    return await reconcile(KEY, cluster, settings, cluster.clock.now)


def pod(cluster, name):
    """A pod's spec."""
    return cluster.objects["Pod", name]["spec"]


def told(cluster):
    """The job as its pods are told it."""
    return json.loads(cluster.objects["ConfigMap", "bot-1"]["data"]["job.json"])["spec"]


async def until_workers(cluster, kubelet):
    await drive(cluster, kubelet, until=lambda: ("Pod", "bot-1-worker-1") in cluster.objects)


async def test_the_pods_have_what_the_profile_gives():
    cluster = cluster_with(raw_profile(**OFFER), **NAMED)
    await until_workers(cluster, FakeKubelet(cluster))
    head, worker = pod(cluster, "bot-1-head"), pod(cluster, "bot-1-worker-0")
    assert head["containers"][0]["image"] == worker["containers"][0]["image"] == "registry.example/own:1"
    assert head["containers"][0]["resources"]["limits"] == {"cpu": "4", "memory": "8Gi"}
    assert worker["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert worker["nodeSelector"] == {"pool": "h100"}
    assert "nodeSelector" not in head
    assert told(cluster)["output"] == {"storage": "pvc://tuned/team-a/bot"}
    assert told(cluster)["compute"]["resourcesPerWorker"] == {"nvidia.com/gpu": 1}
    assert "profileRef" not in told(cluster)
    accepted = cluster.status.condition("Accepted")
    assert (accepted.status, accepted.message) == ("True", "the spec can be run, under the profile small (named by the job)")


async def test_the_pods_are_told_which_servers_a_secret_may_name():
    allow = {"models": ["s3://base"], "s3Endpoints": ["https://minio.example.com"]}
    model = {"source": "s3://base/llama", "secretRef": {"name": "s3"}}
    cluster = cluster_with(raw_profile(**OFFER, allow=allow), **NAMED, model=model)
    await until_workers(cluster, FakeKubelet(cluster))
    job_file = json.loads(cluster.objects["ConfigMap", "bot-1"]["data"]["job.json"])
    assert job_file["metadata"]["endpointBounds"] == {"profile": "small", "secrets": ["s3"], "allowed": ["https://minio.example.com"]}
    assert ("Secret", "s3") not in cluster.objects, "nor is it asked for"


async def test_a_whole_life_is_as_without_a_profile():
    cluster = cluster_with(raw_profile(**OFFER), **NAMED)
    await drive(cluster, FakeKubelet(cluster))
    assert cluster.status.phase == "Complete"
    assert cluster.status.resolved.profile.name == "small"


@pytest.mark.parametrize(
    "after",
    [[], [raw_profile(trainerImage="registry.example/other:2", limits={"workers": 1}, allow={"methods": ["full"]})]],
    ids=["gone", "changed"],
)
async def test_what_becomes_of_the_profile_touches_no_running_job(after):
    cluster = cluster_with(raw_profile(**OFFER), **NAMED)
    kubelet = FakeKubelet(cluster)
    await until_workers(cluster, kubelet)
    kept, pods = cluster.status.resolved.profile, {each["metadata"]["name"]: each["metadata"]["uid"] for each in cluster.pods}
    cluster.profiles = after
    writes = len(cluster.writes)
    await look(cluster)
    assert {each["metadata"]["name"]: each["metadata"]["uid"] for each in cluster.pods} == pods
    assert [write for write in cluster.writes[writes:] if write != "patch status"] == []
    # The next attempt, too, has what the first had.
    kubelet.end(cluster.objects["Pod", "bot-1-head"], 137, reason="Error")
    await drive(cluster, kubelet, until=lambda: ("Pod", "bot-2-head") in cluster.objects)
    assert pod(cluster, "bot-2-head")["containers"][0]["image"] == "registry.example/own:1"
    assert cluster.status.resolved.profile == kept
    await drive(cluster, kubelet)
    assert cluster.status.phase == "Complete"


async def test_an_operator_that_dies_after_any_write_comes_to_the_same_end():
    undisturbed = cluster_with(raw_profile(**OFFER), **NAMED)
    await drive(undisturbed, FakeKubelet(undisturbed))
    for write in range(1, len(undisturbed.writes) + 1):
        cluster = cluster_with(raw_profile(**OFFER), **NAMED)
        cluster.crash_after = write
        kubelet = FakeKubelet(cluster)
        await drive(cluster, kubelet, until=lambda cluster=cluster: cluster.crash_after is None)
        cluster.profiles = []  # it went while the operator was away: what was written must be enough
        await drive(cluster, kubelet)
        assert cluster.status.phase == "Complete", write
        assert cluster.status.resolved.profile == undisturbed.status.resolved.profile
        assert cluster.names("Pod") == undisturbed.names("Pod")


async def test_a_job_beyond_its_profile_is_refused_at_once():
    cluster = cluster_with(raw_profile(limits={"workers": 1}), profileRef={"name": "small"})
    assert await look(cluster) is None
    assert cluster.objects == {}
    status = cluster.status
    words = "spec.compute.workers.max is 2, and the profile small allows at most 1 (limits.workers)"
    assert (status.phase, status.failure.reason, status.failure.message) == ("Failed", "ProfileViolated", words)
    for kind, truth in ("Accepted", "False"), ("Failed", "True"), ("Stalled", "True"), ("Ready", "False"):
        assert (status.condition(kind).status, status.condition(kind).reason) == (truth, "ProfileViolated")
    assert [(event.type, event.reason) for event in cluster.events.values()] == [("Warning", "ProfileViolated")]


async def test_a_job_waits_for_its_profile_and_goes_on_when_it_is_there():
    cluster = cluster_with(**NAMED)
    assert await look(cluster) is None  # no polling: the profile's own event gives it a turn
    status = cluster.status
    assert (status.phase, status.condition("Accepted").status, status.condition("Reconciling").reason) == (
        "Pending",
        "False",
        "ProfileNotFound",
    )
    assert "there is no TuningProfile small" in status.message
    assert cluster.objects == {}
    writes = len(cluster.writes)
    await look(cluster)
    assert len(cluster.writes) == writes
    cluster.profiles = [raw_profile(**OFFER)]
    await drive(cluster, FakeKubelet(cluster))
    assert cluster.status.phase == "Complete"
    assert cluster.status.condition("Accepted").status == "True"


async def test_a_waiting_job_keeps_its_own_deadline():
    cluster = cluster_with(**NAMED, activeDeadlineSeconds=60)
    assert await look(cluster) == 60.0
    cluster.clock.advance(60)
    await look(cluster)
    assert cluster.status.failure.reason == "DeadlineExceeded"


async def test_a_suspended_job_is_refused_before_anyone_resumes_it():
    cluster = cluster_with(raw_profile(limits={"workers": 1}), profileRef={"name": "small"}, suspend=True)
    await look(cluster)
    assert cluster.status.failure.reason == "ProfileViolated"


async def test_a_suspended_job_keeps_the_profile_of_its_first_day():
    cluster = cluster_with(raw_profile(**OFFER), **NAMED, suspend=True)
    await look(cluster)
    assert cluster.status.phase == "Suspended"
    cluster.profiles = [raw_profile(trainerImage="registry.example/other:2")]
    cluster.edit_spec(suspend=False)
    await look(cluster)
    assert pod(cluster, "bot-1-head")["containers"][0]["image"] == "registry.example/own:1"


async def test_a_default_that_appears_later_does_not_touch_a_job_that_runs_without():
    cluster = cluster_with()
    await look(cluster)
    cluster.profiles = [raw_profile(default=True, limits={"workers": 1})]
    await drive(cluster, FakeKubelet(cluster))
    assert cluster.status.phase == "Complete"
    assert cluster.status.resolved.profile is None


async def test_a_job_that_names_none_is_bound_by_the_default():
    cluster = cluster_with(raw_profile("usual", default=True, limits={"workers": 1}))
    await look(cluster)
    assert cluster.status.failure.reason == "ProfileViolated"


async def test_where_a_profile_is_wanted_a_job_without_one_waits():
    cluster = cluster_with(raw_profile())
    await look(cluster, replace(SETTINGS, require_profile=True))
    assert cluster.status.condition("Ready").reason == "ProfileNotFound"
    assert cluster.objects == {}


async def test_the_profiles_deadline_ends_a_job_that_names_none():
    cluster = cluster_with(raw_profile(**OFFER, limits={"activeDeadlineSeconds": 100}), **NAMED)
    await look(cluster)
    cluster.clock.advance(100)
    await look(cluster)
    assert cluster.status.failure.reason == "DeadlineExceeded"


async def test_remote_code_without_a_profile_is_refused():
    cluster = cluster_with(model={"source": "hf://org/model", "trustRemoteCode": True})
    await look(cluster)
    assert cluster.status.failure.reason == "ProfileViolated"
    assert "needs a TuningProfile that says allowRemoteCode" in cluster.status.failure.message


@pytest.mark.parametrize("allowed", [True, False])
async def test_the_pods_are_told_to_trust_where_job_and_profile_both_say_so(allowed):
    cluster = cluster_with(
        raw_profile(allowRemoteCode=True), model={"source": "hf://org/model", "trustRemoteCode": allowed}, profileRef={"name": "small"}
    )
    await look(cluster)
    assert told(cluster)["model"]["trustRemoteCode"] is allowed


async def test_a_report_of_the_tenants_pod_cannot_change_the_profile():
    cluster = cluster_with(raw_profile(**OFFER), **NAMED)
    kubelet = FakeKubelet(cluster)
    await until_workers(cluster, kubelet)
    kept = cluster.status.resolved.profile
    uid = cluster.objects["Pod", "bot-1-head"]["metadata"]["uid"]
    forged = kept.model_copy(update={"allow_remote_code": True, "name": "other"})
    report = cluster.reports[uid]
    cluster.reports[uid] = report.model_copy(
        update={"resolved": cluster.status.resolved.model_copy(update={"profile": forged, "data_digest": "d"})}
    )
    cluster.clock.advance(SETTINGS.poll_seconds)
    await look(cluster)
    assert (cluster.status.resolved.profile, cluster.status.resolved.data_digest) == (kept, "d")


SUITES = {"suites": [{"name": "task", "source": "validation", "metrics": ["loss"]}]}
ELSEWHERE = {"schedule": "0 3 * * *", "suites": [{"name": "task", "source": "s3://elsewhere/fresh.jsonl"}]}
HERE = {**ELSEWHERE, "suites": [{"name": "task", "source": "pvc://data/fresh.jsonl"}]}
REFUSED = (
    "nothing is measured after the release: "
    "spec.monitoring.suites[0] names s3://elsewhere/fresh.jsonl, which the profile small does not allow (allow.data)"
)


def degraded(cluster):
    """The condition Degraded: status, reason and message."""
    found = cluster.status.condition("Degraded")
    return found and (found.status, found.reason, found.message)


async def test_monitoring_that_the_profile_does_not_allow_is_told_at_once_and_until_it_is_mended():
    cluster = cluster_with(raw_profile(allow={"data": ["pvc://data"]}), profileRef={"name": "small"}, evaluation=SUITES)
    kubelet = FakeKubelet(cluster)
    await until_workers(cluster, kubelet)
    assert degraded(cluster) is None
    cluster.edit_spec(monitoring=ELSEWHERE)
    await look(cluster)
    assert degraded(cluster) == ("Unknown", "ProfileViolated", REFUSED)
    since = cluster.status.condition("Degraded").last_transition_time
    await drive(cluster, kubelet)
    assert cluster.status.phase == "Complete"
    assert degraded(cluster) == ("Unknown", "ProfileViolated", REFUSED)
    assert cluster.status.condition("Degraded").last_transition_time == since
    assert [event.message for event in cluster.events.values() if event.reason == "ProfileViolated"] == [REFUSED]
    assert cluster.status.monitoring is None
    assert list(monitoring_lines(cluster.status)) == [f"degraded: Unknown: ProfileViolated: {REFUSED}"]
    writes = len(cluster.writes)
    await look(cluster)
    assert len(cluster.writes) == writes
    cluster.edit_spec(monitoring=HERE)
    await look(cluster)
    assert degraded(cluster)[:2] == ("Unknown", "Pending")
    assert cluster.status.monitoring.next_run_time is not None
    cluster.edit_spec(monitoring=ELSEWHERE)
    await look(cluster)
    assert (degraded(cluster), cluster.status.monitoring) == (("Unknown", "ProfileViolated", REFUSED), None)
    cluster.edit_spec(monitoring=None)
    await look(cluster)
    assert degraded(cluster) is None


async def test_a_failed_job_is_not_told_that_it_is_not_measured():
    cluster = cluster_with(raw_profile(allow={"data": ["pvc://data"]}), profileRef={"name": "small"}, evaluation=SUITES)
    await look(cluster)
    cluster.edit_spec(monitoring=ELSEWHERE, activeDeadlineSeconds=10)
    await look(cluster)
    assert degraded(cluster) is not None
    cluster.clock.advance(10)
    await look(cluster)
    assert cluster.status.failure.reason == "DeadlineExceeded"
    assert degraded(cluster) is None
