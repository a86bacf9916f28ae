"""Which queue a job waits in: that of its label where its profile allows it, else the profile's. Pure.

A label can be changed at any time, so it is looked at each time: one that names another queue than the profile allows has no effect.
"""

from collections.abc import Iterator, Mapping

from finetune_api.resolved_profile import ResolvedProfile
from finetune_api.status import Status

KUEUE = "kueue.x-k8s.io"
KUEUE_QUEUE = f"{KUEUE}/queue-name"
VOLCANO_QUEUE = "volcano.sh/queue-name"

_NAMES_SHOWN = 10


def queue_of(labels: Mapping[str, str], key: str, status: Status) -> str:
    """The queue of a job with these labels, of which `key` names one; empty where it is in none."""
    named, kept = labels.get(key, ""), status.resolved.profile if status.resolved else None
    if kept is None or kept.queue is None:
        return named
    return named if named and _allowed(kept, named) else kept.queue


def queue_violations(labels: Mapping[str, str], kept: ResolvedProfile) -> Iterator[str]:
    """What labels name beyond the profile, whichever of the two the platform has."""
    for key in (KUEUE_QUEUE, VOLCANO_QUEUE):
        named = labels.get(key, "")
        if named and not _allowed(kept, named):
            yield f"metadata.labels has {key}={named}, and the profile {kept.name} allows {_listed(kept)} (queue, allow.queues)"


def _allowed(kept: ResolvedProfile, queue: str) -> bool:
    return kept.allow.queues is None or queue in (kept.queue, *kept.allow.queues)


def _listed(kept: ResolvedProfile) -> str:
    names = list(dict.fromkeys(name for name in (kept.queue, *(kept.allow.queues or ())) if name))
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
