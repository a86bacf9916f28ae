"""What the chart grants: to the operator what it uses and no more, to people what they should have."""

from typing import Any

import helm_python
import pytest
from tests.unit.chart.rendering import EVERYTHING, of_kind, one, render, render_test

from finetune_operator.kinds import required_lease_rules, required_profile_rules, required_rules
from finetune_operator.settings import GANG_SCHEDULERS, GangScheduler


def rules_of(role: dict[str, Any]) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of each thing that a role grants."""
    return triples(role["rules"])


def triples(rules: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]
    }


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["cluster", "namespaces"])
def test_operator_is_granted_what_it_uses_and_no_more(chart: helm_python.Chart, values: dict[str, Any]) -> None:
    objects = render(chart, values)
    for_jobs = [
        role
        for role in of_kind(objects, "ClusterRole") + of_kind(objects, "Role")
        if not role["metadata"]["name"].endswith(("-viewer", "-editor", "-leader", "-profiles"))
    ]
    assert len(for_jobs) == (2 if values else 1)
    for role in for_jobs:
        assert rules_of(role) == triples(required_rules())
    (profiles,) = [role for role in of_kind(objects, "ClusterRole") if role["metadata"]["name"].endswith("-profiles")]
    assert rules_of(profiles) == triples(required_profile_rules())
    (leader,) = [role for role in of_kind(objects, "Role") if role["metadata"]["name"].endswith("-leader")]
    assert rules_of(leader) == triples(required_lease_rules())


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["cluster", "namespaces"])
def test_roles_have_no_wildcard_and_read_no_secret(chart: helm_python.Chart, values: dict[str, Any]) -> None:
    objects = render(chart, values)
    for role in of_kind(objects, "ClusterRole") + of_kind(objects, "Role"):
        granted = rules_of(role)
        assert not any("*" in word for triple in granted for word in triple)
        assert {verb for _, resource, verb in granted if resource.startswith("secrets")} <= {"create", "delete"}
        assert not {resource for _, resource, _ in granted} & {"pods/exec", "pods/attach", "roles", "clusterroles", "rolebindings"}
        assert not {verb for _, _, verb in granted} & {"escalate", "bind", "impersonate"}


def test_every_binding_names_the_operators_account_and_a_role_of_the_chart(chart: helm_python.Chart) -> None:
    for values, account in ({}, "finetune-operator"), (EVERYTHING, "tuning-operator"):
        objects = render(chart, values)
        roles = {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects if "Role" in item["kind"]}
        for binding in of_kind(objects, "RoleBinding") + of_kind(objects, "ClusterRoleBinding"):
            ref = binding["roleRef"]
            assert (ref["kind"], binding["metadata"].get("namespace"), ref["name"]) in roles
            assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "finetune-system"}]
        assert one(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == account


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_the_test_of_an_installation_may_only_offer_jobs(chart: helm_python.Chart, values: dict[str, Any]) -> None:
    objects = render_test(chart, values)
    assert sorted(item["kind"] for item in objects) == ["Pod", "Role", "RoleBinding", "ServiceAccount"]
    assert rules_of(one(objects, "Role")) == {("finetune.dev", "finetunejobs", "create")}
    account, pod = one(objects, "ServiceAccount")["metadata"]["name"], one(objects, "Pod")
    assert one(objects, "RoleBinding")["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "finetune-system"}]
    assert pod["spec"]["serviceAccountName"] == account
    assert {item["metadata"]["namespace"] for item in objects} == {"finetune-system"}
    # Nothing of the installation takes the pod for one of its own.
    labels = pod["metadata"]["labels"]
    assert not one(render(chart, values), "Service")["spec"]["selector"].items() <= labels.items()
    weights = {item["kind"]: int(item["metadata"]["annotations"]["helm.sh/hook-weight"]) for item in objects}
    assert weights["Role"] < weights["RoleBinding"] < weights["Pod"]


def test_people_get_their_roles_by_aggregation(chart: helm_python.Chart) -> None:
    roles = {role["metadata"]["name"]: role for role in of_kind(render(chart), "ClusterRole")}
    viewer, editor = roles["finetune-operator-viewer"], roles["finetune-operator-editor"]
    assert viewer["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"] == "true"
    assert {verb for _, _, verb in rules_of(viewer)} == {"get", "list", "watch"}
    assert "rbac.authorization.k8s.io/aggregate-to-view" not in editor["metadata"]["labels"]
    assert editor["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"] == "true"
    assert {resource for _, resource, _ in rules_of(editor)} == {"finetunejobs"}  # nobody writes a status but the operator


@pytest.mark.parametrize("scheduler", GANG_SCHEDULERS)
def test_pod_groups_are_granted_only_where_a_scheduler_wants_them(chart: helm_python.Chart, scheduler: GangScheduler) -> None:
    objects = render(chart, {"operator": {"gangScheduler": scheduler}})
    (role,) = [
        each for each in of_kind(objects, "ClusterRole") if not each["metadata"]["name"].endswith(("-viewer", "-editor", "-profiles"))
    ]
    assert rules_of(role) == triples(required_rules(scheduler))
    groups = {group for group, resource, _ in rules_of(role) if resource == "podgroups"}
    assert groups == {"volcano": {"scheduling.volcano.sh"}, "scheduler-plugins": {"scheduling.x-k8s.io"}}.get(scheduler, set())
