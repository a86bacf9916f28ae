"""The operator's token is replaced on the disk and the old one ends, as the kubelet and the API server do it for service accounts."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.integration.api.kube import AnswerError, Kube
from tests.integration.api.stages import Stage, is_true

pytestmark = [pytest.mark.api, pytest.mark.asyncio(loop_scope="session")]

ACCOUNT = "operator"


async def bound_token(stage: Stage, secret: str) -> str:
    """A token of the account that ends when this Secret does."""
    made = await stage.kube.create("Secret", {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret}}, stage.namespace)
    bound = {"apiVersion": "v1", "kind": "Secret", "name": secret, "uid": made["metadata"]["uid"]}
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"boundObjectRef": bound}}
    answer = await stage.kube.create("ServiceAccount", request, stage.namespace, ACCOUNT, "token")
    return str(answer["status"]["token"])


def kubeconfig(stage: Stage, name: str, **user: str) -> Path:
    """The operator's kubeconfig, for somebody else."""
    config: Any = yaml.safe_load(stage.server.operator_kubeconfig.read_text())
    for entry in config["users"]:
        entry["user"] = user
    file = stage.folder / name
    file.write_text(yaml.safe_dump(config))
    return file


async def until_refused(stage: Stage, token: str) -> None:
    """API servers believe for some seconds what they have believed before."""
    client = Kube(kubeconfig(stage, "refused.yaml", token=token))
    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    await client.list("FineTuneJob", stage.namespace)
                except AnswerError as error:
                    if error.status != 401:
                        raise
                    return
                await asyncio.sleep(0.5)
    finally:
        await client.close()


async def test_an_operator_whose_token_has_been_replaced_goes_on(stage: Stage) -> None:
    await stage.kube.create(
        "ServiceAccount", {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT}}, stage.namespace
    )
    group, name = "rbac.authorization.k8s.io", f"test-{stage.namespace}"
    binding = {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": stage.namespace}],
    }
    await stage.kube.create("ClusterRoleBinding", binding)
    file, old = stage.folder / "token", await bound_token(stage, "first")
    file.write_text(old)
    try:
        async with stage.player().playing(), stage.operator(kubeconfig(stage, "config.yaml", tokenFile=str(file))).running() as operator:
            await operator.wait_until_ready()
            file.write_text(await bound_token(stage, "second"))
            await stage.kube.delete("Secret", stage.namespace, "first")
            await until_refused(stage, old)
            await stage.apply()
            job = await stage.wait_for_end(operator)
            operator.check_alive()
    finally:
        await stage.kube.delete("ClusterRoleBinding", "", name)
    assert is_true(job, "Complete")
    assert job["status"]["attempt"]["number"] == 1
