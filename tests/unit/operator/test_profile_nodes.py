"""Which nodes a job may ask for under its profile: the taints that it tolerates, and the labels that it selects by."""

import pytest
from tests.builders import Clock, make_job, raw_job
from tests.fakes import FakeCluster, FakeKubelet, drive
from tests.unit.operator.profile_cases import raw_profile

from finetune_api.profile import parse_profile
from finetune_operator.profiles import snapshot, violations

GPU = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
MASTER = {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}
SPOT = {"key": "spot", "value": "yes"}


def found(profile, **compute):
    """What the profile has against a job's compute."""
    spec = make_job(compute=compute, profileRef={"name": "small"}).spec
    parsed = parse_profile(raw_profile(**profile))
    return violations(spec, {}, snapshot(parsed, "named by the job", spec, "team-a", "bot"), parsed)


@pytest.mark.parametrize("listed", [[], [GPU], [GPU, SPOT]])
def test_a_toleration_that_none_of_the_list_covers_is_told_by_its_number(listed):
    assert found({"allow": {"tolerations": listed}}, tolerations=[{**MASTER, "effect": "NoSchedule"}]) == (
        "spec.compute.tolerations[0] is {key: node-role.kubernetes.io/control-plane, operator: Exists, effect: NoSchedule}, "
        "which the profile small does not allow (allow.tolerations)",
    )


def test_each_toleration_is_looked_at():
    asked = [{"operator": "Exists"}, GPU, SPOT, {"key": "spot", "value": "no"}]
    assert found({"allow": {"tolerations": [GPU, SPOT]}}, tolerations=asked) == (
        "spec.compute.tolerations[0] is {operator: Exists}, which the profile small does not allow (allow.tolerations)",
        "spec.compute.tolerations[3] is {key: spot, operator: Equal, value: no}, "
        "which the profile small does not allow (allow.tolerations)",
    )


@pytest.mark.parametrize(
    "profile",
    [
        {},
        {"allow": {"tolerations": [MASTER, GPU]}},
        {"allow": {"tolerations": [{"operator": "Exists"}]}},
        {"allow": {"tolerations": [MASTER]}, "compute": {"tolerations": [GPU]}},
    ],
    ids=["no list", "listed", "everything", "given by the profile"],
)
def test_what_is_listed_or_given_or_unbounded_is_taken(profile):
    assert found(profile, tolerations=[{**MASTER, "effect": "NoExecute", "tolerationSeconds": 30}, GPU]) == ()


def test_what_the_profile_gives_is_no_wider_for_a_job():
    given = {"compute": {"tolerations": [GPU]}, "allow": {"tolerations": []}}
    assert len(found(given, tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}])) == 1, "it tolerates NoExecute, too"


def test_labels_of_nodes_are_bounded_by_their_keys():
    profile = {"compute": {"nodeSelector": {"pool": "a"}}, "allow": {"nodeSelectorKeys": ["zone"]}}
    assert found(profile, nodeSelector={"pool": "a", "zone": "b"}) == ()
    assert found(profile, nodeSelector={"pool": "b", "kubernetes.io/hostname": "gpu-7"}) == (
        "spec.compute.nodeSelector has pool=b, and the profile small allows a (compute.nodeSelector)",
        "spec.compute.nodeSelector names kubernetes.io/hostname, which the profile small does not allow (allow.nodeSelectorKeys)",
    )
    assert found({}, nodeSelector={"kubernetes.io/hostname": "gpu-7"}) == ()


async def test_a_job_that_tolerates_too_much_makes_no_pod():
    spec = {"compute": {"tolerations": [GPU, {"operator": "Exists"}]}, "profileRef": {"name": "small"}}
    profile = raw_profile(compute={"tolerations": [GPU]}, allow={"tolerations": []})
    cluster = FakeCluster(Clock(), raw_job(**spec), profiles=[profile])
    await drive(cluster, FakeKubelet(cluster))
    assert (cluster.status.phase, cluster.objects) == ("Failed", {})
    assert (cluster.status.failure.reason, cluster.status.failure.message) == (
        "ProfileViolated",
        "spec.compute.tolerations[1] is {operator: Exists}, which the profile small does not allow (allow.tolerations)",
    )
