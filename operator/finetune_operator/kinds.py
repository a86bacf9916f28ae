"""Where the API server keeps each kind of object, what the operator does with it, and so what RBAC must grant. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune_api import GROUP, KIND, PLURAL, VERSION
from finetune_api.profile import PROFILE_PLURAL
from finetune_operator.settings import GangScheduler


@dataclass(frozen=True)
class Kind:
    """Where the API server keeps the objects of a kind, and what the operator does with them."""

    api: str
    plural: str
    verbs: tuple[str, ...]

    def path(self, namespace: str, name: str = "") -> str:
        """Path of an object, or of the kind's list in a namespace."""
        return f"{self.api}/namespaces/{namespace}/{self.plural}" + (f"/{name}" if name else "")


KINDS: Mapping[str, Kind] = {
    KIND: Kind(f"/apis/{GROUP}/{VERSION}", PLURAL, ("get", "list", "watch", "delete")),
    "Pod": Kind("/api/v1", "pods", ("get", "list", "watch", "create", "delete", "deletecollection")),
    "ConfigMap": Kind("/api/v1", "configmaps", ("get", "list", "create", "patch", "delete")),
    "Service": Kind("/api/v1", "services", ("get", "create", "patch", "delete")),
    "Secret": Kind("/api/v1", "secrets", ("create", "delete")),
    "Event": Kind("/api/v1", "events", ("list", "create")),
    "NetworkPolicy": Kind("/apis/networking.k8s.io/v1", "networkpolicies", ("get", "create", "patch", "delete")),
}

POD_GROUPS: Mapping[GangScheduler, Kind] = {
    "volcano": Kind("/apis/scheduling.volcano.sh/v1beta1", "podgroups", ("get", "create", "patch", "delete")),
    "scheduler-plugins": Kind("/apis/scheduling.x-k8s.io/v1alpha1", "podgroups", ("get", "create", "patch", "delete")),
}
"""The PodGroups of schedulers that want one."""


def kinds_with(scheduler: GangScheduler) -> Mapping[str, Kind]:
    """What the operator works with where this scheduler schedules gangs."""
    return {**KINDS, "PodGroup": POD_GROUPS[scheduler]} if scheduler in POD_GROUPS else KINDS


PROFILES = f"/apis/{GROUP}/{VERSION}/{PROFILE_PLURAL}"
"""Path of the list of TuningProfiles, which no namespace holds."""

Rule = dict[str, list[str]]


def required_rules(scheduler: GangScheduler = "none") -> list[Rule]:
    """The RBAC rules that the operator needs in each namespace whose jobs it runs, as a Role writes them."""
    rules = [_rule(kind.api, kind.plural, kind.verbs) for kind in kinds_with(scheduler).values()]
    # The finalizers subresource is asked for by clusters that check blockOwnerDeletion (OwnerReferencesPermissionEnforcement).
    own = [_rule(f"/apis/{GROUP}/{VERSION}", f"{PLURAL}/{part}", ("update",)) for part in ("status", "finalizers")]
    return rules + own


def required_profile_rules() -> list[Rule]:
    """The RBAC rules that the operator needs for the whole cluster, as a ClusterRole writes them."""
    return [_rule(f"/apis/{GROUP}/{VERSION}", PROFILE_PLURAL, ("list", "watch"))]


def required_lease_rules() -> list[Rule]:
    """The RBAC rules that leader election needs in the operator's own namespace."""
    return [_rule("/apis/coordination.k8s.io/v1", "leases", ("get", "create", "update"))]


def _rule(api: str, resource: str, verbs: Sequence[str]) -> Rule:
    group = api.split("/")[2] if api.startswith("/apis/") else ""
    return {"apiGroups": [group], "resources": [resource], "verbs": list(verbs)}
