"""What the cluster says of a pod that does not run, was taken away or is not allowed, as reasons. Pure.

The words are those of the API server, the scheduler, the kubelet and its container runtime.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.reasons import Reason
from finetune_api.scrub import scrub

Raw = Mapping[str, Any]
"""A Kubernetes object as JSON."""


@dataclass(frozen=True)
class Waiting:
    """Why something that should run does not."""

    reason: Reason
    message: str


def condition(status: Raw, kind: str) -> Raw:
    """A condition of a pod's status; empty where it is not set."""
    return next((each for each in status.get("conditions") or () if each["type"] == kind), {})


# A pod that waits.

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable", "SignatureValidationFailed")
_START = ("CreateContainerError", "RunContainerError", "CreateContainerConfigError", "CrashLoopBackOff", "PostStartHookError", "StartError")
_MISSING = (
    (re.compile(r'secret "[^"]+" not found|non-existent secret key|couldn\'t find key \S+ in Secret'), Reason.SECRET_NOT_FOUND),
    (re.compile(r'configmap "[^"]+" not found|non-existent config key|couldn\'t find key \S+ in ConfigMap'), Reason.CONFIG_MAP_NOT_FOUND),
    (re.compile(r'persistentvolumeclaim "[^"]+" (not found|is being deleted)'), Reason.VOLUME_CLAIM_NOT_FOUND),
)
_UNBOUND = re.compile(r"unbound (immediate )?PersistentVolumeClaims|bind(ing)? volumes: |provisioning failed")
_NOT_YET = re.compile(r"failed to sync (secret|configmap) cache|object \S+ not registered|timed out waiting for the condition")
"""The kubelet will have it in a moment."""


def waiting_of(raw: Raw, events: Iterable[Raw]) -> Waiting | None:
    """Why a pending pod does not run: its image, its containers, something that it mounts, or no node; None where it is just starting."""
    name, told = (
        raw["metadata"]["name"],
        [event for event in events if event.get("involvedObject", {}).get("uid") == raw["metadata"]["uid"]],
    )
    found = (*_stuck_containers(raw), *_told(sorted(told, key=_event_time, reverse=True)), *_unscheduled(raw))
    return next((Waiting(reason, scrub(f"pod {name}: {words}")) for reason, words in found), None)


def _stuck_containers(raw: Raw) -> Iterator[tuple[Reason, str]]:
    """Its own containers, and those that something in the cluster adds to every pod."""
    status = raw.get("status") or {}
    for kind in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(kind) or ():
            stuck = (container.get("state") or {}).get("waiting") or {}
            word = stuck.get("reason", "")
            words = stuck.get("message") or word
            if word in _IMAGE:
                yield Reason.IMAGE_PULL_FAILED, words
            elif word in _START:
                whose = f"the init container {container.get('name', '')}: " if kind == "initContainerStatuses" else ""
                yield missing(words) or Reason.CONTAINER_START_FAILED, whose + words


def _told(events: list[Raw]) -> Iterator[tuple[Reason, str]]:
    """What the latest Events say."""
    for event in events:
        word, words = event.get("reason"), event.get("message", "")
        if word == "FailedMount" and not _NOT_YET.search(words):
            if reason := missing(words) or (Reason.STORAGE_UNAVAILABLE if _is_of_volume(words) else None):
                yield reason, words
        elif word in ("FailedAttachVolume", "FailedMapVolume"):
            yield Reason.STORAGE_UNAVAILABLE, words
        elif word == "FailedCreatePodSandBox":
            yield Reason.CONTAINER_START_FAILED, words


def _is_of_volume(words: str) -> bool:
    """Whether a volume itself cannot be mounted; what is said of the kubelet's own preparations may pass."""
    return re.search(r"mount failed|MountVolume\.(MountDevice|WaitForAttach|SetUp) failed|rpc error|exit status", words) is not None


def _unscheduled(raw: Raw) -> Iterator[tuple[Reason, str]]:
    scheduled = condition(raw.get("status") or {}, "PodScheduled")
    if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
        words = scheduled.get("message", "no node fits")
        unbound = Reason.STORAGE_UNAVAILABLE if _UNBOUND.search(words) else None
        yield missing(words) or unbound or Reason.UNSCHEDULABLE, words


def missing(words: str) -> Reason | None:
    """The reason for an object that is named and not there."""
    return next((reason for pattern, reason in _MISSING if pattern.search(words)), None)


def _event_time(event: Raw) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or ""


# A pod that was taken away.

STORAGE_LIMIT = re.compile(r"exceeds the (total )?limit|exceeded its local ephemeral storage limit")
_TAKEN_AWAY = (
    (re.compile(r"Evicted"), Reason.EVICTED),
    (re.compile(r"Preempting"), Reason.PREEMPTED),
    (re.compile(r"NodeLost|NodeShutdown|Shutdown|Terminated"), Reason.NODE_LOST),
    (re.compile(r"UnexpectedAdmissionError|NodeAffinity|\w+AffinityError|Out[Oo]f.+|NodePorts|AppArmor"), Reason.NODE_REJECTED),
)
"""The kubelet's word for a pod as a whole."""
_DISRUPTIONS = {
    "PreemptionByScheduler": Reason.PREEMPTED,
    "EvictionByEvictionAPI": Reason.PREEMPTED,
    "DeletionByTaintManager": Reason.NODE_LOST,
    "DeletionByPodGC": Reason.NODE_LOST,
}
"""Reasons of the condition DisruptionTarget."""
_LOW = re.compile(r"low on resource|DiskPressure|MemoryPressure|PIDPressure")
_SHUTDOWN = re.compile(r"node shutdown")


@dataclass(frozen=True)
class Disruption:
    """The cluster took a pod away."""

    reason: Reason
    words: str


def disruption_of(status: Raw) -> Disruption | None:
    """Why the cluster took a pod away, from its status. Filling one's own volume is one's own fault, though the kubelet evicts for it."""
    word, words = status.get("reason", ""), status.get("message", "")
    # Kueue says so in a condition of its own before it deletes a pod.
    target = next((each for kind in ("DisruptionTarget", "TerminationTarget") if (each := condition(status, kind))), {})
    if STORAGE_LIMIT.search(words) or STORAGE_LIMIT.search(target.get("message", "")):
        return None
    by_word = next((reason for pattern, reason in _TAKEN_AWAY if pattern.fullmatch(word)), None)
    if target.get("status") == "True":
        said = target.get("message", "")
        by_kubelet = Reason.EVICTED if _LOW.search(said) else Reason.NODE_LOST if _SHUTDOWN.search(said) else by_word or Reason.PREEMPTED
        reason = _DISRUPTIONS.get(target.get("reason", ""), by_kubelet)
        return Disruption(reason, scrub(f"{target.get('reason', 'disrupted')}: {said}".rstrip(": ")))
    if status.get("phase") == "Failed" and by_word:
        return Disruption(by_word, scrub(f"{word}: {words}".rstrip(": ")))
    return None


# An object that the API server refuses.

REFUSALS = (Reason.FORBIDDEN, Reason.QUOTA_EXCEEDED, Reason.ADMISSION_DENIED)
_QUOTA = re.compile(r"exceeded quota: |failed quota: ")
_POLICY = re.compile(
    r"admission webhook \S+ denied the request|violates PodSecurity|ValidatingAdmissionPolicy \S+ .*denied request"
    r"|unable to validate against any (pod security policy|security context constraint)"
    r"|(maximum|minimum) \S+ (usage|limit|request)|is prohibited by LimitRange"
)


def refusal(words: str) -> Waiting:
    """The API server's words, where it does not take an object: a quota, a policy, or a permission."""
    reason = Reason.QUOTA_EXCEEDED if _QUOTA.search(words) else Reason.ADMISSION_DENIED if _POLICY.search(words) else Reason.FORBIDDEN
    return Waiting(reason, scrub(words))
