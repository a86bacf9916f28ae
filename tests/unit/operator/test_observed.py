"""Raw objects as plain values. The messages are those of the kubelet and the scheduler."""

import json

import pytest
from tests.builders import NAME, T0, UID, at, make_pod, make_report, raw_job, raw_pod, terminated

from finetune_api import LABEL_ATTEMPT, LABEL_ROLE
from finetune_api.report import parse_report, termination_message
from finetune_api.status import Artifact, Metric, ModelSummary, Stage, Usage
from finetune_operator.observed import Observed, job_from, observe, pod_from

UNSCHEDULABLE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def event(reason: str, message: str, *, uid: str = "uid-of-bot-1-head", time: str = "2026-01-01T00:00:05Z") -> dict:
    return {"involvedObject": {"uid": uid}, "reason": reason, "message": message, "lastTimestamp": time, "metadata": {"name": "e"}}


def stuck(reason: str, message: str = "") -> dict:
    return {"containerStatuses": [{"name": "head", "state": {"waiting": {"reason": reason, "message": message}}}]}


def unscheduled(message: str, reason: str = "Unschedulable") -> dict:
    return {"conditions": [{"type": "PodScheduled", "status": "False", "reason": reason, "message": message}]}


WAITING = {
    "an image that is not there": (stuck("ImagePullBackOff", 'Back-off pulling image "x:1"'), [], "ImagePullFailed"),
    "an image name that is none": (stuck("InvalidImageName"), [], "ImagePullFailed"),
    "a container that is being made": (stuck("ContainerCreating"), [], None),
    "a secret": ({}, [event("FailedMount", 'MountVolume.SetUp failed for volume "secret-0" : secret "hub" not found')], "SecretNotFound"),
    "a config map": (
        {},
        [event("FailedMount", 'MountVolume.SetUp failed for volume "configmap-0" : configmap "data" not found')],
        "ConfigMapNotFound",
    ),
    "a key of a config map": (
        {},
        [event("FailedMount", 'MountVolume.SetUp failed for volume "configmap-0" : references non-existent config key: train.jsonl')],
        "ConfigMapNotFound",
    ),
    "a volume that does not attach": ({}, [event("FailedAttachVolume", "AttachVolume.Attach failed")], "StorageUnavailable"),
    "a mount that took long": ({}, [event("FailedMount", "Unable to attach or mount volumes: timed out waiting for the condition")], None),
    "an event of another pod": ({}, [event("FailedMount", 'secret "hub" not found', uid="another")], None),
    "a claim": (unscheduled('0/1 nodes are available: persistentvolumeclaim "models" not found.'), [], "VolumeClaimNotFound"),
    "a node": (unscheduled(UNSCHEDULABLE), [], "Unschedulable"),
    "nothing known": ({}, [], None),
}


@pytest.mark.parametrize(("status", "events", "reason"), WAITING.values(), ids=WAITING)
def test_why_a_pending_pod_does_not_run(status, events, reason) -> None:
    waiting = pod_from(raw_pod(phase="Pending", **status), events).waiting
    assert (waiting.reason if waiting else None) == reason
    if waiting:
        assert waiting.message.startswith("pod bot-1-head: ")


def test_the_words_of_the_scheduler_are_kept() -> None:
    waiting = make_pod(phase="Pending", **unscheduled(UNSCHEDULABLE)).waiting
    assert waiting is not None
    assert waiting.message == f"pod bot-1-head: {UNSCHEDULABLE}"


def test_of_several_events_the_latest_counts() -> None:
    events = [
        event("FailedMount", 'secret "hub" not found', time="2026-01-01T00:00:05Z"),
        event("FailedMount", 'configmap "data" not found', time="2026-01-01T00:00:09Z"),
    ]
    waiting = pod_from(raw_pod(phase="Pending"), events).waiting
    assert waiting is not None
    assert waiting.reason == "ConfigMapNotFound"


def test_a_pod_that_runs_waits_for_nothing() -> None:
    assert pod_from(raw_pod(), [event("FailedMount", 'secret "hub" not found')]).waiting is None


def test_a_pod_that_a_queue_holds_is_gated_and_not_unschedulable() -> None:
    pod = make_pod(phase="Pending", **unscheduled("Scheduling is blocked due to non-empty scheduling gates", "SchedulingGated"))
    assert (pod.gated, pod.waiting) == (True, None)


@pytest.mark.parametrize(
    ("phase", "deletion", "running", "finished"),
    [
        ("Pending", None, False, False),
        ("Running", None, True, False),
        ("Running", at(90), False, False),
        ("Unknown", None, False, False),
        ("Succeeded", None, False, True),
        ("Failed", at(90), False, True),
    ],
)
def test_when_a_pod_runs_and_when_it_has_finished(phase, deletion, running, finished) -> None:
    pod = make_pod(phase=phase, deletion=deletion)
    assert (pod.running, pod.finished, pod.created, pod.deletion) == (running, finished, T0, deletion)


def test_only_what_the_job_owns_is_its_own() -> None:
    """Anyone who may make a pod may put the job's label on it."""
    stranger = raw_pod("worker")
    stranger["metadata"]["ownerReferences"] = [{"uid": "another"}]
    debugger = raw_pod("worker", index=1)
    del debugger["metadata"]["ownerReferences"]
    labels = {LABEL_ATTEMPT: "1"}
    maps = [{"metadata": {"name": "bot-1", "labels": labels, "ownerReferences": [{"uid": UID}]}}, {"metadata": {"labels": {}}}]
    observed = observe(NAME, UID, [raw_pod(), stranger, debugger], maps, [])
    assert [pod.name for pod in observed.pods] == ["bot-1-head"]
    assert observed.anchors == {1}
    assert observed.strangers
    assert not observe(NAME, UID, [raw_pod()], maps, []).strangers


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("a-1-head", {}),
        ("bot-2-head", {}),
        ("bot-1-worker-0", {}),
        ("bot-1-head", {LABEL_ROLE: "chief"}),
        ("bot-1-head", {LABEL_ATTEMPT: "one"}),
        ("bot-1-head", {LABEL_ATTEMPT: ""}),
        ("bot-1-head", {LABEL_ATTEMPT: "1" * 63}),
    ],
)
def test_a_pod_that_only_claims_to_be_the_jobs_is_not(name, labels) -> None:
    """Anyone who may make a pod may also name the job as its owner: such a pod gets no token, and cannot break the look at the job."""
    forged = raw_pod()
    forged["metadata"]["name"] = name
    forged["metadata"]["labels"].update(labels)
    assert observe(NAME, UID, [forged], [], []).pods == ()
    del forged["metadata"]["labels"]
    assert observe(NAME, UID, [forged], [], []).pods == ()


@pytest.mark.parametrize(("name", "attempt"), [("mine", "99"), ("bot-98", "99"), ("bot-x", "x"), ("bot-", ""), ("bot-0", "0")])
def test_a_config_map_that_only_claims_to_be_the_jobs_is_no_anchor(name, attempt) -> None:
    """It would be cleared away for ever: what is deleted goes by the attempt's own names."""
    meta = {"name": name, "labels": {LABEL_ATTEMPT: attempt}, "ownerReferences": [{"uid": UID}]}
    assert observe(NAME, UID, [], [{"metadata": meta}], []).anchors == frozenset()


def test_a_config_map_says_whether_the_other_objects_are_its_own_and_whether_they_are_there() -> None:
    marks = {1: {}, 2: {"annotations": {"finetune.dev/objects": "owned"}}, 3: {"annotations": {"finetune.dev/objects": "remade"}}}
    owner = {"ownerReferences": [{"uid": UID}]}
    maps = [{"metadata": {"name": f"bot-{n}", "labels": {LABEL_ATTEMPT: str(n)}, **owner, **mark}} for n, mark in marks.items()]
    observed = observe(NAME, UID, [], maps, [])
    assert (observed.anchors, observed.owning, observed.remade) == ({1, 2, 3}, {2, 3}, {3})


def test_the_last_word_of_a_head_outlives_it() -> None:
    report = make_report("Publish", outcome="Succeeded")
    head = make_pod(phase="Succeeded", containerStatuses=terminated(0, "Completed", termination_message(report)))
    assert Observed((head,)).report_of(UID, 1) == report
    assert Observed((head,), report=make_report("Train")).report_of(UID, 1) == report
    assert Observed((head,)).report_of(UID, 2) is None


def test_a_last_word_that_is_too_long_leaves_out_the_warnings_before_the_results() -> None:
    artifact = Artifact(kind="merged", uri="pvc://models/bot/merged", digest="sha256:0", bytes=1)
    model = ModelSummary(parameters=1000, trained_parameters=10)
    report = make_report("Publish", outcome="Succeeded", warnings=("w" * 512,) * 8, artifacts=(artifact,), model=model)
    text = termination_message(report)
    assert len(text.encode()) <= 4096
    said = parse_report(text)
    assert said is not None
    assert (said.outcome, said.artifacts, said.model, said.warnings) == ("Succeeded", (artifact,), model, ())


def test_a_termination_message_that_is_a_log_is_no_report() -> None:
    head = make_pod(phase="Failed", containerStatuses=terminated(1, message="Traceback (most recent call last):"))
    assert Observed((head,)).report_of(UID, 1) is None


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('"value":1.5', '"value":NaN'),
        ('"value":1.5', '"value":1e999'),
        ('"trainedTokens":7', '"trainedTokens":99999999999999999999'),
        ("2026-01-01T00:00:00Z", "yesterday"),
        ("2026-01-01T00:00:00Z", "2026-13-41T00:00:00Z"),
    ],
)
def test_a_report_that_the_api_server_would_refuse_as_a_status_is_no_report(right, wrong) -> None:
    """The head is a tenant's pod: what it says must not keep the operator from writing the status."""
    stage = Stage(name="Train", state="Running", start_time="2026-01-01T00:00:00Z")
    report = make_report(metrics=(Metric(name="train/loss", value=1.5),), usage=Usage(trained_tokens=7), stages=(stage,))
    text = json.dumps(report.to_json(), separators=(",", ":"))
    assert right in text
    assert parse_report(text) == report
    assert parse_report(text.replace(right, wrong)) is None


def test_a_job_tells_what_is_wrong_with_its_spec_by_field() -> None:
    raw = raw_job()
    raw["spec"]["training"] |= {"epochs": 0, "learningRate": "fast"}
    job = job_from(raw)
    assert job.spec is None
    assert job.problem == "spec.training.epochs: must be at least 1, not 0; spec.training.learningRate: must be a number, not 'fast'"


def test_a_rule_of_more_than_one_field_is_told_in_its_own_words() -> None:
    """And not as what another library calls such an error."""
    raw = raw_job()
    raw["spec"]["training"] |= {"globalBatchSize": 2}
    raw["spec"]["compute"] = {"workers": {"min": 1, "max": 4}}
    assert job_from(raw).problem == (
        "spec: training.globalBatchSize must not be smaller than compute.workers.max: every worker needs a sequence"
    )


def test_a_token_in_a_spec_does_not_come_into_the_status() -> None:
    raw = raw_job()
    raw["spec"]["model"] = {"source": "https://user:hunter2@host/model"}
    assert "hunter2" not in job_from(raw).problem
    assert job_from(raw).problem.startswith("spec.model.source: must be hf://owner/name")


def test_files_of_this_machine_are_for_local_runs_only() -> None:
    raw = raw_job()
    raw["spec"]["output"]["storage"] = "file:///tmp/out"
    assert job_from(raw).spec is None
    assert job_from(raw, local=True).spec is not None


@pytest.mark.parametrize("value", ["9" * 4300, "-1" + "0" * 400, "1e999"])
def test_a_report_with_a_number_that_no_status_can_hold_is_none(value: str) -> None:
    """An API server would refuse the whole status for it, again and again."""
    best = '{"trial": 1, "value": 0.5, "parameters": {"training.seed": %s}}'
    assert parse_report(f'{{"jobUid": "u", "attempt": 1, "search": {{"best": {best % 7}}}}}') is not None
    assert parse_report(f'{{"jobUid": "u", "attempt": 1, "search": {{"best": {best % value}}}}}') is None


@pytest.mark.parametrize(
    ("amount", "gpus"), [("8", 8), (2, 2), ("1k", 1000), ("1Ki", 1024), ("1500", 1500), ("all", 0), ("-1", 0), ("500m", 0)]
)
def test_the_gpus_of_a_pod_are_counted_as_the_api_server_writes_them(amount, gpus) -> None:
    """A thousand are 1k: it writes every quantity in its shortest form."""
    raw = raw_pod("worker")
    raw["spec"] = {"containers": [{"resources": {"limits": {"nvidia.com/gpu": amount, "cpu": "4"}}}]}
    assert pod_from(raw).gpus == gpus
