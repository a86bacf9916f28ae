"""One job from `kubectl apply` to its end, and its deletion."""

import asyncio
import base64
import collections
import signal

import pytest
from tests.audit import uses
from tests.integration.api.apiserver import OPERATOR_USER, kubeconfig_through
from tests.integration.api.kube import CHILDREN, Object
from tests.integration.api.operators import KEY
from tests.integration.api.players import failure_then_success
from tests.integration.api.proxy import REFUSED, Proxy
from tests.integration.api.stages import Stage, is_true

from finetune_operator.kinds import required_lease_rules, required_profile_rules, required_rules

pytestmark = [pytest.mark.api, pytest.mark.asyncio(loop_scope="session")]


async def test_job_runs_to_complete_and_leaves_only_its_finished_head(stage: Stage) -> None:
    async with stage.player().playing() as player, stage.operator().running() as operator:
        await stage.apply()
        job = await stage.wait_for_end(operator)
        await stage.wait_for_children("Pod/tune-1-head")

    status = job["status"]
    assert status["phase"] == "Complete"
    assert is_true(job, "Ready")
    assert not is_true(job, "Failed")
    assert status["observedGeneration"] == job["metadata"]["generation"]
    assert status["artifacts"][0]["uri"] == "pvc://models/a/adapter"
    assert status["attempt"]["number"] == 1
    assert [stage["state"] for stage in status["stages"]] == ["Succeeded"] * 4
    assert [name for name, _ in player.created] == ["tune-1-head", "tune-1-worker-0", "tune-1-worker-1"]
    assert "finalizers" not in job["metadata"]
    assert "annotations" not in job["metadata"]
    told = collections.Counter(await stage.told())
    assert told == {"Accepted": 1, "Succeeded": 1}


async def test_secret_holds_the_token_and_nothing_else_names_it(stage: Stage) -> None:
    async with stage.player().playing() as player, stage.operator().running():
        player.hold = lambda pod: True
        await stage.apply()
        await player.wait_for(lambda pods: "tune-1-head" in pods)
        children = {kind: await stage.kube.list(kind, stage.namespace) for kind in CHILDREN if kind != "Secret"}
        job = await stage.job()
        secret = _only(await stage.kube.list("Secret", stage.namespace))

    token = base64.b64decode(secret["data"]["attempt-token"]).decode()
    assert len(token) == 64
    assert token not in str(children)
    assert token not in str(job)
    assert KEY not in str(children)


def _only(secrets: list[Object]) -> Object:
    """The one Secret that a job owns: a cluster puts tokens of service accounts beside it."""
    (found,) = (secret for secret in secrets if secret["metadata"].get("ownerReferences"))
    return found


async def test_failed_attempt_is_followed_by_another_which_completes(stage: Stage) -> None:
    async with stage.player(failure_then_success).playing() as player, stage.operator().running() as operator:
        await stage.apply()
        job = await stage.wait_for_end(operator)
        await stage.wait_for_children("Pod/tune-2-head")

    assert job["status"]["phase"] == "Complete"
    assert job["status"]["attempt"]["number"] == 2
    assert job["status"]["attempt"]["failures"] == 1
    assert len({name for name, _ in player.created}) == len(player.created) == 6


async def test_deleted_job_leaves_nothing_while_the_operator_is_down(stage: Stage) -> None:
    async with stage.player().playing() as player:
        player.hold = lambda pod: pod["metadata"]["name"].endswith("worker-1")
        async with stage.operator().running():
            await stage.apply()
            await player.wait_for(lambda pods: "tune-1-worker-1" in pods)
        await stage.kube.delete("FineTuneJob", stage.namespace, "tune")
        assert await stage.kube.get("FineTuneJob", stage.namespace, "tune") is None, "something holds the job back"
        if stage.server.collects_garbage:
            await stage.wait_for_children()
        else:
            print("no controller manager here: garbage collection is not tried, only that every object names its owner")
            assert len(await stage.children()) == 7


async def test_deleted_job_leaves_nothing_while_the_operator_runs(stage: Stage) -> None:
    if not stage.server.collects_garbage:
        pytest.skip("no controller manager: nothing collects what a deleted owner leaves behind")
    async with stage.player().playing() as player, stage.operator().running():
        player.hold = lambda pod: pod["metadata"]["name"].endswith("worker-1")
        await stage.apply()
        await player.wait_for(lambda pods: "tune-1-worker-1" in pods)
        await stage.kube.delete("FineTuneJob", stage.namespace, "tune")
        await stage.wait_for_children()


async def test_api_writes_of_a_life_are_few(stage: Stage) -> None:
    """3 pods, 4 objects beside them; the workers deleted, the ConfigMap with what it owns: 9 writes. The others are status and Events."""
    async with Proxy(stage.server.url).serving() as proxy, stage.player().playing():
        kubeconfig = kubeconfig_through(stage.folder / "kubeconfig", proxy.url, stage.server.operator_kubeconfig)
        async with stage.operator(kubeconfig).running() as operator:
            await stage.apply()
            await stage.wait_for_end(operator)
            await stage.wait_for_children("Pod/tune-1-head")
    print(f"\nAPI writes of one job's life: {len(proxy.writes)}, reads: {proxy.reads}")
    print(*proxy.writes, sep="\n")
    statuses = [write for write in proxy.writes if write.startswith("PUT")]
    events = [write for write in proxy.writes if "/events" in write]
    assert len(proxy.writes) - len(statuses) - len(events) == 9
    assert len(statuses) <= 12
    assert len(events) <= 12


async def _as_an_earlier_operator_made_it(stage: Stage) -> None:
    """The attempt's objects belong to the job, and are deleted one by one."""
    anchor = await stage.kube.get("ConfigMap", stage.namespace, "tune-1")
    assert anchor is not None
    owners = {"ownerReferences": anchor["metadata"]["ownerReferences"]}
    for kind in "Service", "NetworkPolicy":
        await stage.kube.patch(kind, stage.namespace, "tune-1", {"metadata": owners})
    await stage.kube.patch("ConfigMap", stage.namespace, "tune-1", {"metadata": {"annotations": None}})


async def test_operator_uses_every_permission_that_it_asks_for_and_no_other(stage: Stage) -> None:
    """The rules of a role follow from what is used: every verb of this list was seen, and nothing else was."""
    asked_for = {
        (verb, resource)
        for rule in [*required_rules(), *required_profile_rules(), *required_lease_rules()]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        # Checked by an admission plugin that is not on everywhere, without a request of its own.
        if resource != "finetunejobs/finalizers"
    }
    async with Proxy(stage.server.url).serving() as proxy, stage.player(failure_then_success).playing() as player:
        player.hold = lambda pod: True  # so that its Events are asked for
        kubeconfig = kubeconfig_through(stage.folder / "kubeconfig", proxy.url, stage.server.operator_kubeconfig)
        async with stage.operator(kubeconfig, FINETUNE_LEADER_ELECTION="true").running() as operator:
            await stage.apply(ttlSecondsAfterFinished=0)
            await stage.wait_for_job(lambda job: job.get("status", {}).get("phase") == "Pending", "pending", operator)
            await player.wait_for(lambda pods: "tune-1-head" in pods)
            while ("list", "events") not in proxy.used:
                await asyncio.sleep(0.1)
            await _as_an_earlier_operator_made_it(stage)
            await player.release()
            while ("delete", "finetunejobs") not in proxy.used:
                operator.check_alive()
                await asyncio.sleep(0.1)
            await operator.end(signal.SIGTERM)
    # Only used where an operator goes on with what another began.
    if stage.server.audit_log:  # the server's own word on it
        with stage.server.audit_log.open() as lines:
            here = (stage.namespace, None)
            seen = uses(lines, OPERATOR_USER)
            heard = {(verb, resource) for (_, resource, verb), event in seen if event["objectRef"].get("namespace") in here}
        assert proxy.used <= heard <= asked_for
    spare = {("get", "pods")} | {("patch", resource) for resource in ("configmaps", "services", "networkpolicies")}
    assert proxy.used | spare == asked_for


@pytest.mark.parametrize("faults", [[REFUSED] * 12, [500] * 12, [429] * 4], ids=["refused", "500", "429"])
async def test_api_server_that_is_away_for_a_while_is_waited_for(stage: Stage, faults: list[int]) -> None:
    async with Proxy(stage.server.url).serving() as proxy, stage.player().playing() as player:
        player.hold = lambda pod: pod["metadata"]["name"].endswith("worker-1")
        kubeconfig = kubeconfig_through(stage.folder / "kubeconfig", proxy.url, stage.server.operator_kubeconfig)
        async with stage.operator(kubeconfig).running() as operator:
            await stage.apply()
            await player.wait_for(lambda pods: "tune-1-worker-1" in pods)
            proxy.fail(*faults)
            while proxy.failing:
                operator.check_alive()
                await asyncio.sleep(0.1)
            await player.release()
            job = await stage.wait_for_end(operator)
            await stage.wait_for_children("Pod/tune-1-head")
            operator.check_alive()
    assert job["status"]["phase"] == "Complete"
    assert job["status"]["attempt"]["number"] == 1
    assert len(player.created) == 3
