"""The objects of an attempt: golden files, the restricted Pod Security Standard, and what is missing or surplus."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tests.builders import SETTINGS, T0, at, make_job, make_pod, make_report, raw_pod, terminated

from finetune_api.status import Attempt, Status
from finetune_api.v1alpha1 import parse_job
from finetune_operator.lifecycle import advance
from finetune_operator.observed import Job, Observed, job_from, pod_from
from finetune_operator.plan import Removal, belonging, desired_objects, missing, surplus
from finetune_operator.settings import Settings

PLANS = Path(__file__).parents[2] / "data" / "plans"
NAMES = sorted(path.name.removesuffix(".job.yaml") for path in PLANS.glob("*.job.yaml"))
PLATFORM = Settings(trainer_image="registry.example/trainer:1", token_key=b"a key for tests only", image_pull_secrets=("registry",))


def planned(name: str) -> list[dict]:
    job = job_from(yaml.safe_load((PLANS / f"{name}.job.yaml").read_text()))
    assert job.spec is not None, job.problem
    return list(desired_objects(job, job.status, PLATFORM))


@pytest.mark.parametrize("name", NAMES)
def test_a_job_has_the_objects_of_its_golden_file(name: str) -> None:
    """tests/data/plans/README.md tells how to write the files anew."""
    golden = PLANS / f"{name}.objects.yaml"
    objects = planned(name)
    if os.environ.get("REWRITE_PLANS"):
        golden.write_text(yaml.dump_all(objects, sort_keys=False, width=140, Dumper=_PlainDumper))
    assert objects == list(yaml.safe_load_all(golden.read_text()))


def test_an_attempts_secret_has_no_key_that_a_job_can_read() -> None:
    """Its name can be guessed by whoever reads the job's UID, and what a secretRef names may be sent to an address that the job names."""
    readable = {"token", "accessKeyId", "secretAccessKey", "endpoint", "region"}
    for name in NAMES:
        assert not any(readable & each["stringData"].keys() for each in planned(name) if each["kind"] == "Secret")


class _PlainDumper(yaml.SafeDumper):
    """Writes equal values out in full, not as aliases of each other."""

    def ignore_aliases(self, data: object) -> bool:
        return True


@pytest.mark.parametrize("name", NAMES)
def test_pods_keep_to_the_restricted_pod_security_standard(name: str) -> None:
    """The rules of kubernetes.io/docs/concepts/security/pod-security-standards, and two of our own: a read-only root, and no API token."""
    pods = [each["spec"] for each in planned(name) if each["kind"] == "Pod"]
    assert pods
    for pod in pods:
        assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "initContainers"))
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        kinds = {key for volume in pod["volumes"] for key in volume if key != "name"}
        assert kinds <= {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["privileged"] is False
            assert not any("hostPort" in port for port in container.get("ports", ()))
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", NAMES)
def test_quantities_are_strings(name: str) -> None:
    """Server-side apply of older API servers (1.20) refuses numbers."""
    for pod in (each["spec"] for each in planned(name) if each["kind"] == "Pod"):
        resources = pod["containers"][0]["resources"]
        assert all(isinstance(quantity, str) for part in resources.values() for quantity in part.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_object_belongs_to_its_job(name: str) -> None:
    uid = yaml.safe_load((PLANS / f"{name}.job.yaml").read_text())["metadata"]["uid"]
    for each in planned(name):
        (owner,) = each["metadata"]["ownerReferences"]
        if each["kind"] in ("ConfigMap", "Pod"):
            assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (uid, True, True)
        else:
            (anchor,) = (each["metadata"] for each in planned(name) if each["kind"] == "ConfigMap")
            assert (owner["kind"], owner["name"], owner["controller"]) == ("ConfigMap", anchor["name"], True)
        assert each["metadata"]["labels"]["finetune.dev/job-uid"] == uid


def test_an_object_belongs_to_the_config_map_that_was_made() -> None:
    """Not to one of its name: that of a deleted job could be on its way out."""
    config_map, secret = planned("training")[:2]
    assert belonging(secret, "u-9")["metadata"]["ownerReferences"][0]["uid"] == "u-9"
    assert belonging(config_map, "u-9") == config_map


@pytest.mark.parametrize("name", NAMES)
def test_the_job_file_says_all_and_can_be_read(name: str) -> None:
    config_map = next(each for each in planned(name) if each["kind"] == "ConfigMap")
    job = parse_job(json.loads(config_map["data"]["job.json"]))
    original = job_from(yaml.safe_load((PLANS / f"{name}.job.yaml").read_text()))
    assert job.spec == original.spec
    assert job.metadata.uid == original.uid


def test_the_head_is_told_that_a_queue_may_hold_pods_back() -> None:
    """And no other label: the head has no use for them."""
    labels = {"kueue.x-k8s.io/queue-name": "team", "app": "bot"}
    job = make_job(status=Status(attempt=Attempt(number=1)))
    queued = replace(job, labels=labels)
    config_map = next(each for each in desired_objects(queued, job.status, SETTINGS) if each["kind"] == "ConfigMap")
    assert parse_job(json.loads(config_map["data"]["job.json"])).metadata.labels == {"kueue.x-k8s.io/queue-name": "team"}


def test_the_token_is_in_the_secret_alone() -> None:
    job = make_job(status=Status(attempt=Attempt(number=1), workers_wanted=2))
    token = SETTINGS.token(job.uid, 1)
    found = [each["kind"] for each in desired_objects(job, job.status, SETTINGS) if token in json.dumps(each)]
    assert found == ["Secret"]


def test_a_second_job_of_a_name_has_a_secret_of_its_own() -> None:
    status = Status(attempt=Attempt(number=1))
    first, second = (make_job(uid=uid, status=status) for uid in ("u-1", "u-2"))
    names = []
    for job in (first, second):
        objects = desired_objects(job, status, SETTINGS)
        (secret,) = (each["metadata"]["name"] for each in objects if each["kind"] == "Secret")
        (head,) = (each for each in objects if each["kind"] == "Pod")
        (mounted,) = (volume["secret"]["secretName"] for volume in head["spec"]["volumes"] if volume["name"] == "token")
        names.append(secret)
        assert secret == mounted
    assert len(set(names)) == 2


def test_names_are_dns_labels_for_the_longest_job() -> None:
    sizes = {"compute": {"workers": {"min": 1, "max": 1024}}, "training": {"globalBatchSize": 1024}}
    job = make_job(name="x" * 48, status=Status(attempt=Attempt(number=99), workers_wanted=1024), **sizes)
    for each in desired_objects(job, job.status, SETTINGS):
        assert len(each["metadata"]["name"]) <= 63
        if each["kind"] == "Pod":
            assert each["spec"]["hostname"] == each["metadata"]["name"]


@pytest.mark.parametrize(
    "attempt", [Attempt(), Attempt(number=2, end_time="2026-01-01T00:00:00Z")], ids=["before the first attempt", "after an attempt"]
)
def test_nothing_is_wanted_between_attempts(attempt: Attempt) -> None:
    job = make_job(status=Status(attempt=attempt, workers_wanted=2))
    assert desired_objects(job, job.status, SETTINGS) == ()


SECRET = "bot-1-c53e4c4d"
"""printf %s 5f7c0e2e-0000-4000-8000-000000000001 | sha256sum | head -c 8"""
RUNNING = Status(attempt=Attempt(number=1, start_time="2026-01-01T00:00:00Z", head_seen=True), workers_wanted=2)
ENDED = RUNNING.model_copy(update={"attempt": RUNNING.attempt.model_copy(update={"end_time": "2026-01-01T00:01:00Z"}), "workers_wanted": 0})


def all_missing(status: Status, *pods, anchors=(1,), **marks) -> list[dict]:
    job = make_job(status=status)
    observed = Observed(tuple(pods), frozenset(anchors), **{"owning": frozenset(anchors), **marks})
    return list(missing(desired_objects(job, status, SETTINGS), status, observed))


def names_missing(status: Status, *pods, **given) -> list[str]:
    return [f"{each['kind']} {each['metadata']['name']}" for each in all_missing(status, *pods, **given)]


def test_only_what_is_missing_is_applied() -> None:
    assert names_missing(RUNNING, make_pod(), make_pod("worker")) == ["Pod bot-1-worker-1"]


def test_without_a_head_everything_is_applied_again() -> None:
    """The operator may have ended anywhere before it made the head."""
    assert names_missing(RUNNING)[:5] == ["ConfigMap bot-1", f"Secret {SECRET}", "Service bot-1", "NetworkPolicy bot-1", "Pod bot-1-head"]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_a_secret_that_went_with_an_older_job_of_the_same_name_is_made_again(role) -> None:
    message = 'MountVolume.SetUp failed for volume "token" : secret "bot-1-c53e4c4d" not found'
    waiting = raw_pod(role, phase="Pending")
    event = {"involvedObject": {"uid": waiting["metadata"]["uid"]}, "reason": "FailedMount", "message": message, "metadata": {}}
    pods = {"head": make_pod(), "worker": make_pod("worker"), role: pod_from(waiting, [event])}
    assert f"Secret {SECRET}" in names_missing(RUNNING.model_copy(update={"workers_wanted": 1}), *pods.values())


@pytest.mark.parametrize("seen", [{"anchors": ()}, {"remade": frozenset({1})}], ids=["it is gone", "the operator ended while it made them"])
def test_where_somebody_deleted_the_config_map_all_that_went_with_it_is_made_anew(seen) -> None:
    """A head that is there tells no longer that the others are; the ConfigMap says so itself when they are."""
    objects = all_missing(RUNNING, make_pod(), make_pod("worker"), make_pod("worker", index=1), **seen)
    assert [each["kind"] for each in objects] == ["ConfigMap", "Secret", "Service", "NetworkPolicy", "ConfigMap"]
    assert [objects[at]["metadata"]["annotations"]["finetune.dev/objects"] for at in (0, -1)] == ["remade", "owned"]
    assert objects[0]["data"] == objects[-1]["data"]


def test_an_attempt_that_an_earlier_operator_began_is_finished_as_it_was_begun() -> None:
    """Its Secret belongs to the job and cannot be read, so nothing may say that it goes with the ConfigMap."""
    objects = all_missing(RUNNING, owning=frozenset())
    assert {each["metadata"]["ownerReferences"][0]["kind"] for each in objects} == {"FineTuneJob"}
    assert not any("annotations" in each["metadata"] for each in objects)


def removed(status: Status, *pods, anchors=(), seconds: float = 0, **marks) -> list[Removal]:
    job = make_job(status=status)
    desired = desired_objects(job, status, SETTINGS)
    return list(surplus(desired, job, status, Observed(tuple(pods), frozenset(anchors), **marks), SETTINGS, at(seconds)))


def test_nothing_of_a_running_attempt_is_surplus() -> None:
    assert removed(RUNNING, make_pod(), make_pod("worker"), make_pod("worker", index=1), anchors=[1]) == []


def test_a_failed_worker_makes_place_for_another_but_not_at_once() -> None:
    pod = make_pod("worker", phase="Failed")
    assert removed(RUNNING, make_pod(), pod, anchors=[1], seconds=9) == []
    assert removed(RUNNING, make_pod(), pod, anchors=[1], seconds=10) == [Removal("Pod", "bot-1-worker-0", "uid-of-bot-1-worker-0")]


def test_workers_that_are_no_longer_wanted_go_with_their_grace() -> None:
    status = RUNNING.model_copy(update={"workers_wanted": 0})
    assert removed(status, make_pod(), make_pod("worker"), anchors=[1]) == [Removal("Pod", "bot-1-worker-0", "uid-of-bot-1-worker-0")]


def test_workers_that_all_go_are_deleted_in_one_request() -> None:
    workers = [make_pod("worker", index=index) for index in range(3)]
    labels = {"finetune.dev/job-uid": "5f7c0e2e-0000-4000-8000-000000000001", "finetune.dev/attempt": "1", "finetune.dev/role": "worker"}
    together = Removal("Pod", "bot-1-worker-*", labels=labels)
    none_wanted = RUNNING.model_copy(update={"workers_wanted": 0})
    assert removed(none_wanted, make_pod(), *workers, anchors=[1]) == [together]
    assert removed(none_wanted, make_pod(), *workers[:2], make_pod("worker", index=2, deletion=at(30)), anchors=[1]) == [together]
    assert removed(ENDED, *workers, anchors=[1]) == [replace(together, grace=10)]


@pytest.mark.parametrize("why", ["one has the labels that is not the job's", "others are wanted", "they are overdue"])
def test_workers_go_one_by_one_where_a_request_for_all_could_take_another(why) -> None:
    none_wanted = RUNNING.model_copy(update={"workers_wanted": 0})
    names = ["bot-1-worker-0", "bot-1-worker-1"]
    if why == "others are wanted":
        failed = [make_pod("worker", index=index, phase="Failed") for index in range(2)]
        gone = removed(RUNNING, make_pod(), *failed, anchors=[1], seconds=10)
    elif why == "they are overdue":
        overdue = [make_pod("worker", index=index, deletion=at(0)) for index in range(2)]
        gone = removed(none_wanted, make_pod(), *overdue, anchors=[1], seconds=61)
    else:
        gone = removed(none_wanted, make_pod(), *(make_pod("worker", index=index) for index in range(2)), strangers=True)
    assert [(removal.name, removal.uid, removal.labels) for removal in gone] == [(name, f"uid-of-{name}", None) for name in names]


def test_the_head_goes_before_its_workers_so_that_they_save_a_checkpoint() -> None:
    head, worker = make_pod(), make_pod("worker")
    assert removed(ENDED, head, worker, anchors=[1]) == [Removal("Pod", "bot-1-head", "uid-of-bot-1-head")]
    going = make_pod(deletion=at(90))
    assert removed(ENDED, going, worker, anchors=[1]) == []
    assert removed(ENDED, worker, anchors=[1]) == [Removal("Pod", "bot-1-worker-0", "uid-of-bot-1-worker-0", grace=10)]


def test_the_attempts_objects_go_with_its_config_map_after_its_pods() -> None:
    assert removed(ENDED, anchors=[1], owning=frozenset({1})) == [Removal("ConfigMap", "bot-1")]


def test_those_that_an_earlier_operator_made_go_one_by_one_and_the_config_map_last() -> None:
    assert removed(ENDED, anchors=[1]) == [
        Removal("Secret", SECRET),
        *(Removal(kind, "bot-1") for kind in ("Service", "NetworkPolicy", "ConfigMap")),
    ]


def test_a_pod_on_a_node_that_is_gone_is_not_waited_for() -> None:
    pod = make_pod("worker", deletion=at(90))
    assert removed(RUNNING, make_pod(), pod, anchors=[1], seconds=150) == []
    forced = Removal("Pod", "bot-1-worker-0", "uid-of-bot-1-worker-0", grace=0)
    assert removed(RUNNING, make_pod(), pod, anchors=[1], seconds=151) == [forced]


def test_a_finished_head_stays_until_the_next_attempt_begins() -> None:
    head = make_pod(phase="Failed", containerStatuses=terminated(1))
    assert removed(ENDED, head) == []
    second = RUNNING.model_copy(update={"attempt": RUNNING.attempt.model_copy(update={"number": 2})})
    assert removed(second, head) == [Removal("Pod", "bot-1-head", "uid-of-bot-1-head")]


def test_a_head_that_does_not_end_after_its_success_is_ended_after_its_grace() -> None:
    job = make_job(status=RUNNING)
    status = advance(job, Observed((make_pod(),), frozenset(), make_report("Publish", outcome="Succeeded")), SETTINGS, T0)
    assert status.phase == "Complete"
    assert removed(status, make_pod(), seconds=89) == []
    assert removed(status, make_pod(), seconds=90) == [Removal("Pod", "bot-1-head", "uid-of-bot-1-head")]
    assert removed(status, make_pod(), make_pod("worker")) == [Removal("Pod", "bot-1-worker-0", "uid-of-bot-1-worker-0")]


def taught_by(teacher: dict) -> list[dict]:
    """The pods of a job that learns from this teacher, a head and a worker."""
    status = Status(attempt=Attempt(number=1), workers_wanted=1)
    job = make_job(status=status, objective={"distillation": {"teacher": teacher, "response": {}}})
    pods = [each["spec"] for each in desired_objects(job, status, SETTINGS) if each["kind"] == "Pod"]
    assert len(pods) == 2
    return pods


def test_a_teachers_claim_is_mounted_to_be_read() -> None:
    for pod in taught_by({"source": "pvc://teachers/large"}):
        (volume,) = (each["name"] for each in pod["volumes"] if each.get("persistentVolumeClaim") == {"claimName": "teachers"})
        (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == volume)
        assert mount == {"name": volume, "mountPath": "/mnt/finetune/claims/teachers", "readOnly": True}


@pytest.mark.parametrize(
    ("teacher", "pods"),
    [
        ({"source": "hf://org/large", "secretRef": {"name": "of-the-teacher"}}, {"head", "worker"}),
        ({"endpoint": {"url": "https://models.example.com/v1", "model": "large", "secretRef": {"name": "of-the-teacher"}}}, {"head"}),
    ],
    ids=["files", "endpoint"],
)
def test_a_teachers_secret_is_mounted_where_it_is_used(teacher: dict, pods: set[str]) -> None:
    """A served teacher is asked by the head alone; files are fetched by the workers too."""
    found = set()
    for pod in taught_by(teacher):
        for volume in (each["name"] for each in pod["volumes"] if each.get("secret", {}).get("secretName") == "of-the-teacher"):
            (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == volume)
            assert mount == {"name": volume, "mountPath": "/mnt/finetune/secrets/of-the-teacher", "readOnly": True}
            found.add(pod["containers"][0]["name"])
    assert found == pods


def test_workers_mount_nothing_of_the_data() -> None:
    """They read what the head has prepared: a ReadWriteOnce claim of the data would else keep them from every node but the head's."""
    pods = {each["metadata"]["name"]: each["spec"] for each in planned("all-sources") if each["kind"] == "Pod"}
    mounted = {name: {each["mountPath"] for each in pod["containers"][0]["volumeMounts"]} for name, pod in pods.items()}
    own = {"/etc/finetune/job", "/etc/finetune/token", "/home/finetune", "/tmp", "/dev/shm"}
    of_the_data = {"/mnt/finetune/configmaps/small-sets", "/mnt/finetune/secrets/bucket.keys"}
    of_both = {"/mnt/finetune/claims/shared", "/mnt/finetune/secrets/hub"}
    assert mounted == {"all-1-head": own | of_both | of_the_data, "all-1-worker-0": own | of_both}


def test_workers_mount_nothing_of_an_encoder() -> None:
    """The head alone embeds: a worker has no use for an encoder's claim or Secret."""
    encoder = {"source": "hf://org/encoder", "secretRef": {"name": "of-the-encoder"}}
    suite = {"name": "task", "source": "validation", "metrics": ["embeddingSimilarity"], "encoder": encoder}
    prompt = {
        "name": "passages",
        "retrieval": {
            "knowledgeBase": {"source": "pvc://docs"},
            "retriever": {"kind": "embedding", "encoder": {"source": "pvc://encoders/small"}},
        },
    }
    status = Status(attempt=Attempt(number=1), workers_wanted=1)
    job = make_job(status=status, evaluation={"suites": [suite]}, baseline={"prompts": [prompt]})
    head, worker = ([mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]] for pod in _pods(job, status))
    for path in ("secrets/of-the-encoder", "claims/encoders", "claims/docs"):
        assert f"/mnt/finetune/{path}" in head
        assert f"/mnt/finetune/{path}" not in worker


def _pods(job: Job, status: Status) -> list[dict]:
    pods = [each for each in desired_objects(job, status, SETTINGS) if each["kind"] == "Pod"]
    return sorted(pods, key=lambda pod: pod["metadata"]["name"])
