"""Two operators at once, with and without leader election, and the end of each in its own way."""

import asyncio
import signal

import pytest
from tests.integration.api.apiserver import kubeconfig_through
from tests.integration.api.players import endless, success
from tests.integration.api.proxy import Proxy
from tests.integration.api.stages import Stage

pytestmark = [pytest.mark.api, pytest.mark.asyncio(loop_scope="session")]

ELECTION = {"FINETUNE_LEADER_ELECTION": "true"}


async def test_two_operators_at_once_do_no_harm(stage: Stage) -> None:
    async with stage.player(success).playing() as player, stage.operator().running() as one, stage.operator().running() as two:
        await asyncio.gather(one.wait_until_ready(), two.wait_until_ready())
        await stage.apply()
        job = await stage.wait_for_end(one, two)
        await stage.wait_for_children("Pod/tune-1-head")

    assert job["status"]["phase"] == "Complete"
    assert job["status"]["attempt"]["number"] == 1
    assert sorted(name for name, _ in player.created) == ["tune-1-head", "tune-1-worker-0", "tune-1-worker-1"]
    reasons = await stage.told()
    assert len(reasons) == len(set(reasons)), "a transition was told twice"


async def test_one_replica_leads_and_the_other_takes_over_from_a_killed_leader(stage: Stage) -> None:
    async with stage.player(endless).playing() as player, stage.operator(**ELECTION).running() as first:
        while await first.wait_until_ready() != "leads\n":
            await asyncio.sleep(0.1)
        async with stage.operator(**ELECTION).running() as second:
            assert await second.wait_until_ready() == "stands by\n"
            await stage.apply()
            await player.wait_for(lambda pods: len(pods) == 3)
            assert 'finetune_operator_reconcile_total{result="done"}' in (await first.get("/metrics"))[1]
            idle = (await second.get("/metrics"))[1]
            assert "finetune_operator_leader 0.0" in idle
            assert "finetune_operator_reconcile_total{" not in idle
            assert "finetune_job_info{" not in idle

            first.kill()
            while await second.wait_until_ready() != "leads\n":
                await asyncio.sleep(0.2)
            await player.lose("tune-1-worker-0")
            await player.wait_for(lambda pods: len(pods) == 3 and len(player.created) > 3)
            busy = (await second.get("/metrics"))[1]
    assert f'finetune_job_status_phase{{name="tune",namespace="{stage.namespace}",phase="Training"}} 1.0' in busy
    assert sum(name == "tune-1-head" for name, _ in player.created) == 1


async def test_terminated_leader_gives_the_lease_back(stage: Stage) -> None:
    async with stage.operator(**ELECTION).running() as operator:
        while await operator.wait_until_ready() != "leads\n":
            await asyncio.sleep(0.1)
        assert (await stage.kube.get("Lease", stage.namespace, "finetune-operator"))["spec"]["holderIdentity"]
        assert await operator.end(signal.SIGTERM) == 0
    lease = await stage.kube.get("Lease", stage.namespace, "finetune-operator")
    assert lease is not None
    assert not lease["spec"].get("holderIdentity")


async def test_leader_that_loses_the_lease_ends_at_once(stage: Stage) -> None:
    async with stage.operator(**ELECTION).running() as operator:
        while await operator.wait_until_ready() != "leads\n":
            await asyncio.sleep(0.1)
        taken = {"spec": {"holderIdentity": "another", "leaseDurationSeconds": 3600, "renewTime": "2100-01-01T00:00:00.000000Z"}}
        await stage.kube.patch("Lease", stage.namespace, "finetune-operator", taken)
        assert await asyncio.wait_for(operator.exited(), 60) == 1
    assert "the lead is lost" in operator.log_tail()


async def test_operator_without_its_key_says_which_variable_is_wrong(stage: Stage) -> None:
    async with stage.operator(FINETUNE_TOKEN_KEY_FILE="/nowhere/key").running() as operator:
        assert await operator.exited() == 2
    assert "/nowhere/key" in operator.log.read_text()


async def test_operator_that_comes_before_its_crd_waits_for_it(stage: Stage) -> None:
    async with Proxy(stage.server.url).serving() as proxy, stage.player().playing():
        kubeconfig = kubeconfig_through(stage.folder / "kubeconfig", proxy.url, stage.server.operator_kubeconfig)
        proxy.fail(*[404] * 4)  # as for a kind that is not there; the metrics ask, too
        async with stage.operator(kubeconfig).running() as operator:
            assert await operator.wait_until_ready() == "leads\n"
            assert "waiting for the API server, the CRD" in operator.log.read_text()
            await stage.apply()
            assert (await stage.wait_for_end(operator))["status"]["phase"] == "Complete"
