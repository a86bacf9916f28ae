"""The tests' own client of the API server: plain requests as the admin, so that no test leans on the operator's client."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import yaml

PATHS = {
    "Namespace": "/api/v1/namespaces",
    "Node": "/api/v1/nodes",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "TuningProfile": "/apis/finetune.dev/v1alpha1/tuningprofiles",
    "FineTuneJob": "/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs",
    "Pod": "/api/v1/namespaces/{namespace}/pods",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps",
    "Secret": "/api/v1/namespaces/{namespace}/secrets",
    "Service": "/api/v1/namespaces/{namespace}/services",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "LimitRange": "/api/v1/namespaces/{namespace}/limitranges",
    "Event": "/api/v1/namespaces/{namespace}/events",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases",
}
CHILDREN = ("Pod", "ConfigMap", "Secret", "Service", "NetworkPolicy")
Object = dict[str, Any]


class AnswerError(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, body: Object) -> None:
        super().__init__(f"{status}: {body.get('message')}")
        self.status = status


class Kube:
    """Requests as the user of a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        context = next(c["context"] for c in config["contexts"] if c["name"] == config["current-context"])
        self.url = next(c["cluster"]["server"] for c in config["clusters"] if c["name"] == context["cluster"])
        user = next(u["user"] for u in config["users"] if u["name"] == context["user"])
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {user['token']}"},
            connector=aiohttp.TCPConnector(ssl=False, limit=0),
            timeout=aiohttp.ClientTimeout(total=30),
        )

    async def close(self) -> None:
        await self._session.close()

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, or None."""
        try:
            return await self.call("GET", self._path(kind, namespace, name))
        except AnswerError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str) -> list[Object]:
        return list((await self.call("GET", self._path(kind, namespace)))["items"])

    async def create(self, kind: str, body: Object, namespace: str = "", name: str = "", part: str = "") -> Object:
        """Create the object, or a part of one (`binding`)."""
        path = self._path(kind, namespace, name) + (f"/{part}" if part else "")
        return await self.call("POST", path, body)

    async def patch(self, kind: str, namespace: str, name: str, body: Object, part: str = "") -> Object:
        """JSON merge patch of the object, or of its `status`."""
        path = self._path(kind, namespace, name) + (f"/{part}" if part else "")
        return await self.call("PATCH", path, body, "application/merge-patch+json")

    async def delete(self, kind: str, namespace: str, name: str, grace: int | None = None, uid: str | None = None) -> None:
        """Delete the object, or only the one with this UID; its absence is no error."""
        options: Object = {} if grace is None else {"gracePeriodSeconds": grace}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        try:
            await self.call("DELETE", self._path(kind, namespace, name), options)
        except AnswerError as error:
            if error.status not in (404, 409):
                raise

    async def watch(self, kind: str, namespace: str) -> AsyncIterator[tuple[str, Object]]:
        """Events (type, object): first ADDED for what is there, then each change, without an end."""
        path = self._path(kind, namespace)
        params = {"watch": "true"}
        async with self._session.get(self.url + path, params=params, timeout=aiohttp.ClientTimeout(total=None)) as response:
            async for line in response.content:
                event = json.loads(line)
                yield event["type"], event["object"]

    def _path(self, kind: str, namespace: str = "", name: str = "") -> str:
        return PATHS[kind].format(namespace=namespace) + (f"/{name}" if name else "")

    async def call(self, method: str, path: str, body: Object | None = None, media: str = "application/json") -> Object:
        data = None if body is None else json.dumps(body)
        async with self._session.request(method, self.url + path, data=data, headers={"Content-Type": media}) as response:
            answer = json.loads(await response.read())
            if response.status >= 300:
                raise AnswerError(response.status, answer)
            return dict(answer)
