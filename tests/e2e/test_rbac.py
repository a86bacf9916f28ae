"""What the API server has seen the operator do, beside what the chart grants it: by the audit log, under the chart's own service account.

FINETUNE_AUDIT_LOG names the log (JSON lines of audit.k8s.io/v1 at the level Metadata or above), where the tests run beside the API server.
Lives that the other files of this folder play count too where they ran before; the ones played here are enough for every permission.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from tests.audit import Use, granted, uses
from tests.e2e.kubectl import Kubectl, assert_all_gone, wait_until
from tests.e2e.names import RELEASE, SYSTEM
from tests.e2e.test_disruptions import doomed
from tests.e2e.test_whole_way import ENDLESS, job, pods_of, status_of

from finetune_api import ANNOTATION_RETRY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

USER = f"system:serviceaccount:{SYSTEM}:{RELEASE}"
ANYBODY = {("", "selfsubjectaccessreviews", "create"), ("authorization.k8s.io", "selfsubjectrulesreviews", "create")}
"""Granted to every account by Kubernetes itself."""
ON_OTHER_CLUSTERS: dict[Use, str] = {
    ("finetune.dev", "finetunejobs/finalizers", "update"): "asked for by an admission plugin, without a request of its own",
    ("", "pods", "get"): "the head is looked for by its name where the list does not have it yet",
    **{
        (group, resource, "delete"): "of an attempt that an earlier operator began, whose ConfigMap does not own them"
        for group, resource in (("", "secrets"), ("", "services"), ("networking.k8s.io", "networkpolicies"))
    },
    **{
        (group, resource, verb): "where an operator goes on with what another began"
        for group, resource in (("", "configmaps"), ("", "services"), ("networking.k8s.io", "networkpolicies"))
        for verb in ("get", "patch")
    },
}
"""What may stay unused in a run, and why it is granted all the same."""


def bound(kubectl: Kubectl, kind: str) -> list[dict[str, Any]]:
    """The roles, or cluster roles, that are bound to the operator's account."""
    account = {"kind": "ServiceAccount", "name": RELEASE, "namespace": SYSTEM}
    bindings = kubectl.get(f"{kind}bindings")["items"]
    return [kubectl.get(kind, each["roleRef"]["name"]) for each in bindings if account in each.get("subjects", ())]


@pytest.fixture
def audit_log() -> Path:
    path = Path(os.environ.get("FINETUNE_AUDIT_LOG", ""))
    if not path.is_file():
        pytest.skip("FINETUNE_AUDIT_LOG names no audit log of the API server")
    return path


def play(release: Kubectl, kubectl: Kubectl) -> None:
    """Lives in which everything happens that the operator needs a permission for: an end and its expiry, a pod that waits, a suspension."""
    two = {"workers": {"min": 2, "max": 2}}  # go together
    kubectl.apply(job("rbac-complete", ttlSecondsAfterFinished=1, training={**ENDLESS, "epochs": 1}, compute=two))
    wait_until("the job has had its time", lambda: kubectl.find("finetunejob", "rbac-complete") is None, 420)
    absent = {"data": {"train": {"configMap": {"name": "absent-data", "key": "train.jsonl"}}}}
    kubectl.apply(job("rbac-waits", **absent))
    wait_until("the reason is known from Events", lambda: _reason(kubectl, "rbac-waits") == "ConfigMapNotFound", 120)
    release("rollout", "restart", f"deployment/{RELEASE}")  # the next one reads the Lease and goes on with what is there
    release("rollout", "status", f"deployment/{RELEASE}", "--timeout=120s", timeout=140)
    kubectl("annotate", "finetunejob", "rbac-waits", f"{ANNOTATION_RETRY}=1")
    kubectl("patch", "finetunejob", "rbac-waits", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    wait_until("its head has gone", lambda: not pods_of(kubectl, "rbac-waits", "head"), 120)
    kubectl("delete", "finetunejob", "rbac-waits")
    assert_all_gone(kubectl, "rbac-waits", 60)


def _reason(kubectl: Kubectl, name: str) -> str:
    conditions = status_of(kubectl, name).get("conditions", [])
    return next((each["reason"] for each in conditions if each["type"] == "Ready"), "")


def test_granted_is_what_is_used(release: Kubectl, kubectl: Kubectl, storage: str, audit_log: Path) -> None:
    play(release, kubectl)
    began = kubectl.get("namespace", kubectl.namespace)["metadata"]["creationTimestamp"]  # an earlier run had namespaces of its own
    with audit_log.open() as lines:
        seen = [(use, event) for use, event in uses(lines, USER) if event["requestReceivedTimestamp"] >= began]
    allowed = granted([*bound(release, "role"), *bound(kubectl, "role"), *bound(release, "clusterrole")])
    used = {use for use, _ in seen} - ANYBODY
    forbidden = {use for use, event in seen if event.get("responseStatus", {}).get("code") == 403 and use not in allowed}
    assert forbidden == set(), "the operator was refused what it asked for"
    assert used <= allowed
    assert allowed - used <= ON_OTHER_CLUSTERS.keys(), "granted, and not used"
    objects = {event["objectRef"].get("namespace") for _, event in seen if event["objectRef"]["resource"] != "selfsubjectaccessreviews"}
    assert objects <= {SYSTEM, kubectl.namespace, doomed(kubectl).namespace, None}, (
        "the operator looks into other namespaces than those that it watches"
    )
