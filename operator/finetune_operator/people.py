"""What people's commands ask of the API server beside reading: apply and change jobs, list their pods, read logs."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from finetune_api import KIND, LABEL_JOB_NAME
from finetune_operator.cluster import KubernetesCluster, connect
from finetune_operator.port import ApiError

FIELD_MANAGER = "finetune"
"""Owner of what a person applies, as `kubectl get --show-managed-fields` tells."""


@contextlib.asynccontextmanager
async def people(context: str = "") -> AsyncIterator["People"]:
    """The cluster of a context of the user's kubeconfig; empty is the current one."""
    async with connect(context=context) as cluster:
        yield People(cluster)


class People:
    """A person's requests. Each raises ApiError with the server's words."""

    def __init__(self, cluster: KubernetesCluster) -> None:
        self._cluster = cluster

    async def job(self, namespace: str, name: str) -> dict[str, Any] | None:
        """The job, or None where there is none of this name."""
        try:
            return await self._cluster.call("get", self._cluster.path(KIND, namespace, name), f"{KIND} {namespace}/{name}")
        except ApiError as error:
            if error.status == 404 and error.reason == "NotFound":
                return None
            raise

    async def jobs(self, namespace: str | None) -> list[dict[str, Any]]:
        """The jobs of a namespace, or of all."""
        return await self._cluster.jobs(namespace)

    async def apply(self, namespace: str, manifest: Mapping[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        """Make the job, or bring in line the one that is there: what the manifest no longer says goes. The job as it is then.

        On trial the server looks at all of it, and stores nothing.
        """
        name = manifest["metadata"]["name"]
        body = {**manifest, "metadata": {**manifest["metadata"], "namespace": namespace}}
        query = [("fieldManager", FIELD_MANAGER), ("force", "true"), *([("dryRun", "All")] if dry_run else ())]
        path = self._cluster.path(KIND, namespace, name)
        return await self._cluster.call(
            "patch", path, f"{KIND} {namespace}/{name}", body=body, query=query, media="application/apply-patch+yaml"
        )

    async def change(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        """A JSON merge patch of the job."""
        path = self._cluster.path(KIND, namespace, name)
        query = [("fieldManager", FIELD_MANAGER)]
        await self._cluster.call("patch", path, f"{KIND} {namespace}/{name}", body=patch, query=query, media="application/merge-patch+json")

    async def pods(self, namespace: str, job: str) -> list[dict[str, Any]]:
        """The pods that carry the job's name."""
        query = [("labelSelector", f"{LABEL_JOB_NAME}={job}")]
        answer = await self._cluster.call("list", self._cluster.path("Pod", namespace), f"pods in {namespace}", query=query)
        return list(answer.get("items") or [])

    async def log(self, namespace: str, pod: str, *, follow: bool, tail: int) -> AsyncIterator[str]:
        """The lines of a pod's log; -1 begins with the first one, and `follow` goes on as more come."""
        query = [("follow", "true")] if follow else []
        query += [("tailLines", str(tail))] if tail >= 0 else []
        async for line in self._cluster.lines(f"{self._cluster.path('Pod', namespace, pod)}/log", f"log of pod {namespace}/{pod}", query):
            yield line
