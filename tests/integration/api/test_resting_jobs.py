"""An operator that starts beside jobs that have ended: it reads none of them, and clears away what a crash left of one."""

import asyncio
import copy

import pytest
from tests.integration.api.apiserver import kubeconfig_through
from tests.integration.api.kube import Object
from tests.integration.api.operators import Operator
from tests.integration.api.proxy import Proxy
from tests.integration.api.stages import LIFE_SECONDS, Stage

pytestmark = [pytest.mark.api, pytest.mark.asyncio(loop_scope="session")]


async def _complete(stage: Stage) -> Object:
    """A job that has run to its end, without an operator that is still there; its head pod."""
    async with stage.player().playing(), stage.operator().running() as operator:
        await stage.apply()
        await stage.wait_for_end(operator)
        await stage.wait_for_children("Pod/tune-1-head")
        head = await stage.kube.get("Pod", stage.namespace, "tune-1-head")
    assert head is not None
    return head


async def _until_listed(operator: Operator) -> None:
    """Wait for its first look at all jobs at once, and for what it starts."""
    async with asyncio.timeout(LIFE_SECONDS):
        await operator.wait_until_ready()
        while "the jobs are listed" not in operator.log.read_text():
            operator.check_alive()
            await asyncio.sleep(0.1)
    await asyncio.sleep(1)


async def test_a_job_that_has_ended_and_left_nothing_is_not_read_when_the_operator_starts(stage: Stage) -> None:
    await _complete(stage)
    async with Proxy(stage.server.url).serving() as proxy:
        kubeconfig = kubeconfig_through(stage.folder / "kubeconfig", proxy.url, stage.server.operator_kubeconfig)
        async with stage.operator(kubeconfig).running() as operator:
            await _until_listed(operator)
            assert ("list", "configmaps") in proxy.used
            assert ("get", "finetunejobs") not in proxy.used
            assert proxy.writes == []
            # It is still listened to.
            await stage.kube.patch("FineTuneJob", stage.namespace, "tune", {"spec": {"ttlSecondsAfterFinished": 0}})
            async with asyncio.timeout(LIFE_SECONDS):
                while await stage.kube.get("FineTuneJob", stage.namespace, "tune") is not None:
                    await asyncio.sleep(0.1)


@pytest.mark.parametrize("kind", ["Pod", "ConfigMap"])
async def test_what_is_left_of_a_job_that_has_ended_goes_when_the_operator_starts(stage: Stage, kind: str) -> None:
    head = await _complete(stage)
    meta = {key: copy.deepcopy(head["metadata"][key]) for key in ("labels", "ownerReferences")}
    if kind == "Pod":
        meta["labels"] |= {"finetune.dev/role": "worker", "app.kubernetes.io/component": "worker"}
        spec = {"containers": [{"name": "left", "image": "left"}], "automountServiceAccountToken": False}
        left: Object = {"metadata": {**meta, "name": "tune-1-worker-0"}, "spec": spec}
    else:
        left = {"metadata": {**meta, "name": "tune-1", "annotations": {"finetune.dev/objects": "owned"}}, "data": {}}
    await stage.kube.create(kind, left, stage.namespace)
    assert len(await stage.children()) == 2
    async with stage.operator().running() as operator:
        await _until_listed(operator)
        await stage.wait_for_children("Pod/tune-1-head")
