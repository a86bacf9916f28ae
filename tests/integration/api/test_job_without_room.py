"""A job that its user fills up until etcd takes no more of it: it holds no nodes meanwhile."""

import asyncio

import pytest
from tests.integration.api.kube import AnswerError, Object
from tests.integration.api.players import endless
from tests.integration.api.stages import LIFE_SECONDS, Stage, is_true

pytestmark = [pytest.mark.api, pytest.mark.long, pytest.mark.asyncio(loop_scope="session")]


async def _fill_up(stage: Stage) -> None:
    """Add labels, which are many and free to choose, in ever smaller parts, until not one more is taken."""
    number, part = 0, 4096
    while part:
        labels = {f"filler-{number + each}": "x" * 63 for each in range(part)}
        try:
            await stage.kube.patch("FineTuneJob", stage.namespace, "tune", {"metadata": {"labels": labels}})
            number += part
        except AnswerError as error:
            if error.status not in (413, 500):
                raise
            part //= 2


async def _pods(stage: Stage) -> list[Object]:
    return [pod for pod in await stage.kube.list("Pod", stage.namespace) if pod["status"].get("phase") in ("Pending", "Running")]


async def test_its_pods_go_when_its_time_is_over(stage: Stage) -> None:
    async with stage.player(endless).playing(), stage.operator(FINETUNE_POLL_SECONDS="1").running() as operator:
        await stage.apply()
        await stage.wait_for_job(lambda job: (job.get("status", {}).get("progress") or {}).get("step", 0) > 0, "training", operator)
        await _fill_up(stage)
        # One label makes room for the deadline, and not for what is to be said when that has passed.
        change = {"metadata": {"labels": {"filler-0": None}}, "spec": {"activeDeadlineSeconds": 1}}
        await stage.kube.patch("FineTuneJob", stage.namespace, "tune", change)
        async with asyncio.timeout(LIFE_SECONDS):
            while await _pods(stage):
                operator.check_alive()
                await asyncio.sleep(0.2)
        assert "so its 3 pods go: " in operator.log.read_text()
        assert not is_true(await stage.job(), "Failed")

        labels = (await stage.job())["metadata"]["labels"]
        await stage.kube.patch("FineTuneJob", stage.namespace, "tune", {"metadata": {"labels": dict.fromkeys(labels)}})
        job = await stage.wait_for_job(lambda job: is_true(job, "Failed"), "failed", operator)
    assert job["status"]["failure"]["reason"] == "DeadlineExceeded"
