"""One API server for the session, a namespace for each test, the operator's own rules for the operator."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import yaml
from tests.integration.api.apiserver import ApiServer, NoApiServerError, api_server
from tests.integration.api.kube import AnswerError, Kube, Object
from tests.integration.api.players import NODE
from tests.integration.api.stages import NewStage, Stage

from finetune_operator.kinds import required_lease_rules, required_profile_rules, required_rules

CRDS = sorted((Path(__file__).parents[3] / "crds").glob("*.yaml"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(api_server(tmp_path_factory.mktemp("api-server")))
        except NoApiServerError as error:
            pytest.skip(str(error))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def kube(server: ApiServer) -> AsyncIterator[Kube]:
    kube = Kube(server.admin_kubeconfig)
    try:
        for definition in CRDS:
            await _create(kube, "CustomResourceDefinition", yaml.safe_load(definition.read_text()))
        if server.operator_user:
            await _grant(kube, server.operator_user)
        else:
            await _create(kube, "Node", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        await _until_served(kube)
        yield kube
    finally:
        if not server.operator_user:
            await kube.delete("Node", "", NODE)
        await kube.close()


async def _grant(kube: Kube, user: str) -> None:
    """The operator may do what it says it needs, and nothing else."""
    rules = [*required_rules(), *required_profile_rules(), *required_lease_rules()]
    meta = {"name": "finetune-operator"}
    await _create(
        kube, "ClusterRole", {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": meta, "rules": rules}
    )
    await _create(
        kube,
        "ClusterRoleBinding",
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": meta["name"]},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        },
    )


async def _create(kube: Kube, kind: str, body: Object) -> None:
    try:
        await kube.create(kind, body)
    except AnswerError as error:
        if error.status != 409:  # a cluster that is given may have it already
            raise


async def _until_served(kube: Kube) -> None:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(AnswerError, ValueError):
                await kube.list("FineTuneJob", "default")
                return
            await asyncio.sleep(0.1)


_numbers = itertools.count(1)


@pytest_asyncio.fixture(loop_scope="session")
async def new_stage(kube: Kube, server: ApiServer, tmp_path: Path) -> AsyncIterator[NewStage]:
    """Makes namespaces, which go when the test ends."""
    made: list[str] = []

    async def make() -> Stage:
        namespace = f"test-{uuid.uuid4().hex[:6]}-{next(_numbers)}"
        await kube.create("Namespace", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        made.append(namespace)
        if server.collects_garbage:  # pods need the account that the controller manager makes
            async with asyncio.timeout(30):
                while await kube.get("ServiceAccount", namespace, "default") is None:
                    await asyncio.sleep(0.05)
        folder = tmp_path / namespace
        folder.mkdir()
        return Stage(kube, server, namespace, folder)

    yield make
    if not server.operator_user:  # the tests' own server goes as a whole, and emptying a namespace is a lot of work for it
        for namespace in made:
            await kube.delete("Namespace", "", namespace)


@pytest_asyncio.fixture(loop_scope="session")
async def stage(new_stage: NewStage) -> Stage:
    return await new_stage()
