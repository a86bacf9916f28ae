"""Secrets in what pods and kubelets say, and the operator's own: none is in a status, an Event or a manifest but where it has to be."""

import json
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from tests.builders import SETTINGS, UID, Clock, raw_job, stages, terminated
from tests.fakes import KEY, FakeCluster, FakeKubelet, Object, drive

from finetune_api.report import Report, termination_message
from finetune_api.status import Failure
from finetune_operator.pods import TOKEN_KEY
from finetune_operator.reconcile import reconcile

TOLD = "tell-nobody"
SHAPES = (
    "Authorization: Bearer {}",
    "https://user:{}@registry.example/trainer:1",
    "s3://bucket/key?X-Amz-Signature={}",
    "AWS_SECRET_ACCESS_KEY={}",
    "sk-{}",
)


def hostile_report(text: str) -> str:
    """The last word of a head that scrubs nothing."""
    why = Failure(stage="Train", reason="StorageUnavailable", message=text, log=f"{text}\n{text}", hint=text, retryable=False)
    report = Report(job_uid=UID, attempt=1, stages=stages("Train"), outcome="Failed", message=text, warnings=(text,), failure=why)
    return termination_message(report)


def succeeded(text: str) -> str:
    """The last word of one that did well."""
    report = Report(job_uid=UID, attempt=1, stages=stages("Publish", ended=True), outcome="Succeeded", message=text, warnings=(text,))
    return termination_message(report)


def waiting(text: str) -> Object:
    state = {"waiting": {"reason": "ImagePullBackOff", "message": f"Back-off pulling image {text}"}}
    return {"phase": "Pending", "containerStatuses": [{"name": "head", "state": state}]}


def unscheduled(text: str) -> Object:
    return {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}]}


WHERE: dict[str, Callable[[str], Object]] = {
    "report": lambda text: {"phase": "Failed", "containerStatuses": terminated(1, "Error", hostile_report(text))},
    "log": lambda text: {"phase": "Failed", "containerStatuses": terminated(1, "Error", f"Traceback:\nRuntimeError: {text}\n")},
    "image": waiting,
    "scheduler": unscheduled,
    "ending report": lambda text: {"phase": "Succeeded", "containerStatuses": terminated(0, "Completed", succeeded(text))},
    "eviction": lambda text: {"phase": "Failed", "reason": "Evicted", "message": f"The node was low on memory: {text}"},
}
"""Where a secret stands: from a text to a head pod's status."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", WHERE)
async def test_what_pods_say_is_scrubbed_before_it_is_repeated(where: str, shape: str) -> None:
    cluster = FakeCluster(Clock(), raw_job(backoffLimit=0))
    kubelet = FakeKubelet(cluster, schedulable=lambda pod: False)
    await drive(cluster, kubelet, until=lambda: bool(cluster.pods))
    cluster.pods[0]["status"] = WHERE[where](shape.format(f"{TOLD}-{secrets.token_hex(6)}"))
    for _ in range(6):
        cluster.clock.advance(40)
        await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
    told = json.dumps(written(cluster), default=str)
    assert "***" in told, "it was repeated"
    assert TOLD not in told, told[max(told.find(TOLD) - 300, 0) :][:400]


def written(cluster: FakeCluster) -> dict[str, Any]:
    """All that the operator has written."""
    assert cluster.job is not None
    ours = {f"{kind} {name}": {**each, "status": None} for (kind, name), each in cluster.objects.items()}  # a pod's status is the kubelet's
    return {"status": cluster.job["status"], "metadata": cluster.job["metadata"], "events": list(cluster.events.values()), **ours}


async def test_the_attempts_token_is_in_its_secret_alone_and_the_key_nowhere() -> None:
    cluster = FakeCluster(Clock(), raw_job())
    await drive(cluster, FakeKubelet(cluster), until=lambda: len(cluster.pods) == 3)
    token = SETTINGS.token(UID, 1)
    holders = [name for name, each in written(cluster).items() if token in json.dumps(each, default=str)]
    secret = next(each for (kind, _), each in cluster.objects.items() if kind == "Secret")
    assert holders == [f"Secret {secret['metadata']['name']}"]
    assert secret["stringData"] == {TOKEN_KEY: token}
    assert SETTINGS.token_key.decode() not in json.dumps(written(cluster), default=str)
