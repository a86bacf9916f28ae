"""All jobs at once, and which of them rest: a few lists, whatever the number of jobs."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from finetune_api import KIND, LABEL_JOB_UID
from finetune_operator.cluster import METADATA_LIST, KubernetesCluster
from finetune_operator.kinds import KINDS
from finetune_operator.observed import head_name
from finetune_operator.port import JobKey
from finetune_operator.resting import has_ended_for_good

PAGE = 100
"""Objects that are held in memory at a time. With 500 a thousand jobs took 50 MiB more, which Python does not give back."""
_LEFT: tuple[tuple[str, dict[str, str]], ...] = (
    ("ConfigMap", {}),
    ("Pod", {}),
    ("Pod", {"fieldSelector": "status.phase!=Succeeded,status.phase!=Failed"}),
)
"""Lists of what may be left of a job that has ended. Without its ConfigMap an attempt has nothing beside pods (see `plan`)."""


async def survey(cluster: KubernetesCluster, namespaces: Sequence[str]) -> tuple[dict[str, JobKey], set[str]]:
    """Every job of these namespaces, or of all where none is named, by UID; and the UIDs of those that rest. Raises ApiError.

    Of a job that rests nothing is there but the head pod that its last attempt ended with. The jobs are listed first: for one that has
    ended nothing more is made.
    """
    keys: dict[str, JobKey] = {}
    heads: dict[str, str] = {}
    for path in _lists(KIND, namespaces):
        async for job in _items(cluster, path):
            meta = job["metadata"]
            keys[meta["uid"]] = JobKey(meta["namespace"], meta["name"])
            if has_ended_for_good(job):
                heads[meta["uid"]] = head_name(meta["name"], (job["status"].get("attempt") or {}).get("number", 0))
    left: set[str] = set()
    for kind, selected in _LEFT if heads else ():
        for path in _lists(kind, namespaces):
            async for each in _items(cluster, path, {"labelSelector": LABEL_JOB_UID, **selected}, accept=METADATA_LIST):
                uid = each["metadata"]["labels"][LABEL_JOB_UID]
                if kind != "Pod" or selected or each["metadata"]["name"] != heads.get(uid):
                    left.add(uid)
    return keys, heads.keys() - left


def _lists(kind: str, namespaces: Sequence[str]) -> list[str]:
    """Paths of the lists of a kind in these namespaces, or of the one list of all."""
    return [KINDS[kind].path(namespace) for namespace in namespaces] or [f"{KINDS[kind].api}/{KINDS[kind].plural}"]


async def _items(
    cluster: KubernetesCluster, path: str, query: dict[str, str] | None = None, accept: str = "application/json"
) -> AsyncIterator[dict[str, Any]]:
    """The objects of a list, read past the cache, a part at a time."""
    asked = {"limit": str(PAGE), **(query or {})}
    while True:
        answer = await cluster.call("list", path, path.rsplit("/", 1)[1], query=list(asked.items()), accept=accept)
        for item in answer.get("items") or []:  # older API servers say null for an empty list of metadata
            yield item
        if not (token := (answer.get("metadata") or {}).get("continue")):
            return
        asked["continue"] = token
