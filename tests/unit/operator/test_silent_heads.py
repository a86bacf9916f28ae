"""A head that cannot be asked, or hangs, or shares its pod with somebody: its job comes to an end, and says why."""

from datetime import datetime
from typing import Any

from tests.builders import SETTINGS, Clock, at, make_job, make_pod, make_report, raw_job, raw_pod
from tests.fakes import KEY, FakeCluster
from tests.unit.operator.looks import BEGUN, PREPARING, TRAINING, WORKERS, condition, step

from finetune_api.reasons import Reason
from finetune_api.report import termination_message
from finetune_operator.observed import Observed, Pod, pod_from
from finetune_operator.pace import SOON_SECONDS
from finetune_operator.plan import desired_objects, surplus
from finetune_operator.reconcile import reconcile
from finetune_operator.times import rfc3339


def head(started: datetime, *beside: dict[str, Any], role: str = "head", state: dict[str, Any] | None = None) -> Pod:
    """A pod that runs, its own container in a state (running), with the statuses of other containers."""
    own = {"name": role, "state": state or {"running": {"startedAt": rfc3339(started)}}}
    return pod_from(raw_pod(role, containerStatuses=[*beside, own]))


def ended(code: int, message: str = "") -> dict[str, Any]:
    """The state of a container that has ended."""
    return {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed", "message": message}}


PROXY = {"name": "a-proxy", "state": {"running": {"startedAt": rfc3339(at(0))}}}


def test_a_head_that_never_answers_is_not_waited_for_for_ever() -> None:
    """A NetworkPolicy keeps the operator out: nobody would ever make the workers that the head asks for."""
    pod = head(at(100))
    status = step(BEGUN, pod, now=at(101), preRunningDeadlineSeconds=600)
    assert (status.phase, status.message) == ("Pending", "the head pod runs, and has yet to answer the operator")
    assert status.attempt.waiting_time == rfc3339(at(100)), "the time before it was started is no time in which it could answer"
    status = step(status, pod, now=at(699), preRunningDeadlineSeconds=600)
    assert status.attempt.running
    status = step(status, pod, now=at(700), preRunningDeadlineSeconds=600)
    assert condition(status, "Failed") == ("True", Reason.PRE_RUNNING_DEADLINE_EXCEEDED)
    assert status.message == (
        "within preRunningDeadlineSeconds (600): pod bot-1-head runs, but does not answer the operator on port 8000: let the operator "
        "reach it (NetworkPolicies, a mesh, a firewall)"
    )
    assert not desired_objects(make_job(status=status), status, SETTINGS)


def test_one_word_of_the_head_ends_the_wait() -> None:
    pod = head(at(100))
    status = step(step(BEGUN, pod, now=at(101)), pod, report=make_report("Prepare"), now=at(1000))
    assert (status.phase, status.attempt.waiting_time) == ("Preparing", None)
    assert step(status, pod, now=at(10**6)).attempt.running, "what it is heard to be at may take long"


def test_a_head_that_was_left_alone_has_the_whole_time_afterwards() -> None:
    pod = head(at(100))
    paused = BEGUN.model_copy(update={"conditions": tuple(each.model_copy(update={"reason": Reason.PAUSED}) for each in BEGUN.conditions)})
    status = step(paused, pod, now=at(10**5))
    assert (status.attempt.running, status.attempt.waiting_time) == (True, rfc3339(at(10**5)))


async def test_a_job_whose_head_cannot_be_asked_ends_and_leaves_nothing_that_runs() -> None:
    cluster = FakeCluster(Clock(), raw_job())
    for _ in range(10_000):
        delay = await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
        for pod in cluster.pods:
            if pod["status"]["phase"] == "Pending":
                pod["status"] = {"phase": "Running", "podIP": "10.0.0.1"}
            if "deletionTimestamp" in pod["metadata"]:
                cluster.objects.pop(("Pod", pod["metadata"]["name"]))
        cluster.collect_garbage()
        if delay is None:
            break
        cluster.clock.advance(delay)
    assert (cluster.status.phase, cluster.objects) == ("Failed", {})
    assert (cluster.clock.now - at(0)).total_seconds() < 1800 + 10 * SOON_SECONDS


def test_a_head_that_hangs_is_killed_by_its_node() -> None:
    """From outside it looks like one that is busy; only its own node's word about it may end it."""
    made = desired_objects(make_job(status=BEGUN), BEGUN, SETTINGS)
    (container,) = next(each for each in made if each["kind"] == "Pod")["spec"]["containers"]
    probe = container["livenessProbe"]
    assert probe["httpGet"] == container["readinessProbe"]["httpGet"], "no token is asked for there"
    assert probe["periodSeconds"] * probe["failureThreshold"] == 600
    killed = step(TRAINING, make_pod(phase="Failed", containerStatuses=[{"name": "head", "state": ended(137)}]), *WORKERS, now=at(700))
    assert killed.failure is not None
    assert (killed.failure.reason, killed.failure.retryable, killed.attempt.failures) == (Reason.HEAD_LOST, True, 1)


def test_a_pod_whose_own_container_has_ended_has_ended_whoever_is_still_in_it() -> None:
    """A mesh puts a proxy beside every container: its pods run for ever."""
    failing = head(at(0), PROXY, state=ended(139))
    assert (failing.phase, failing.finished, failing.lingering, failing.exit and failing.exit.code) == ("Failed", True, True, 139)
    status = step(TRAINING, failing, *WORKERS, now=at(60))
    assert (status.attempt.running, status.attempt.failures) == (False, 1)
    over = step(TRAINING, failing, *WORKERS, now=at(60), backoffLimit=0)
    job = make_job(status=over, backoffLimit=0)
    assert [each.name for each in surplus((), job, over, Observed((failing,)), SETTINGS, at(61))] == ["bot-1-head"]


def test_a_success_beside_a_proxy_is_one_and_nothing_goes_on_running() -> None:
    said = termination_message(make_report("Publish", outcome="Succeeded"))
    pod = head(at(0), PROXY, state=ended(0, said))
    status = step(TRAINING, pod, now=at(60))
    assert status.phase == "Complete"
    job = make_job(status=status)
    assert [each.name for each in surplus((), job, status, Observed((pod,)), SETTINGS, at(61))] == ["bot-1-head"]
    alone = make_pod(phase="Succeeded", containerStatuses=[{"name": "head", "state": ended(0, said)}])
    assert surplus((), job, status, Observed((alone,)), SETTINGS, at(61)) == (), "its log can be read"


def test_how_a_proxy_ended_is_not_how_the_pod_did() -> None:
    proxy = {"name": "a-proxy", "state": ended(0, "bye")}
    pod = make_pod(phase="Failed", containerStatuses=[proxy, {"name": "head", "state": ended(1, "no such file")}])
    assert pod.exit is not None
    assert (pod.exit.code, pod.exit.message) == (1, "no such file")
    stays = head(at(0), {"name": "a-proxy", "state": ended(0, "bye")})
    assert (stays.phase, stays.running, stays.lingering) == ("Running", True, False)


def test_a_worker_beside_a_proxy_is_made_anew() -> None:
    died = head(at(0), PROXY, role="worker", state=ended(137))
    assert (died.finished, died.lingering) == (True, True)
    status = step(PREPARING, make_pod(), died, WORKERS[1], report=make_report("Train"), now=at(60))
    assert (status.workers_wanted, status.workers_ready) == (2, 1)
    job = make_job(status=status)
    made = desired_objects(job, status, SETTINGS)
    going = surplus(made, job, status, Observed((make_pod(), died, WORKERS[1])), SETTINGS, at(60))
    assert [(each.name, each.uid) for each in going] == [("bot-1-worker-0", died.uid)]
