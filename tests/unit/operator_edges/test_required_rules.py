"""What the operator asks of the cluster's authorisation."""

from finetune_operator.kinds import required_lease_rules, required_profile_rules, required_rules


def test_rules_have_no_wildcard_and_never_read_secrets() -> None:
    rules = required_rules() + required_profile_rules() + required_lease_rules()
    assert not [rule for rule in rules if "*" in str(rule)]
    verbs = {resource: set(rule["verbs"]) for rule in rules for resource in rule["resources"]}
    assert verbs["secrets"] == {"create", "delete"}
    assert verbs["finetunejobs"] == {"get", "list", "watch", "delete"}
    assert verbs["pods"] == {"get", "list", "watch", "create", "delete", "deletecollection"}
    assert verbs["finetunejobs/status"] == {"update"}
    assert verbs["tuningprofiles"] == {"list", "watch"}
    assert verbs["leases"] == {"get", "create", "update"}
    groups = {resource: rule["apiGroups"] for rule in rules for resource in rule["resources"]}
    assert groups["pods"] == [""]
    assert groups["networkpolicies"] == ["networking.k8s.io"]
