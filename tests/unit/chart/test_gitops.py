"""What Argo CD, Flux and kstatus make of a job in every state: the Lua by a real Lua 5.1, CEL by a real evaluator, kstatus by its rule."""

from typing import Any

import cel
import pytest
import yaml
from lupa.lua51 import LuaRuntime, lua_type
from tests.job_states import NOW, STATES, job
from tests.unit.chart.rendering import CHART

from finetune_api.v1alpha1 import parse_job
from finetune_operator.observed import job_from
from finetune_operator.requests import is_canceled, revival

ARGO_CD = yaml.safe_load((CHART / "gitops/argocd-cm.yaml").read_text())["data"]
HEALTH = ARGO_CD["resource.customizations.health.finetune.dev_FineTuneJob"]
ACTIONS = yaml.safe_load(ARGO_CD["resource.customizations.actions.finetune.dev_FineTuneJob"])
GOING_ON = ("pending", "queued", "preparing", "baseline", "searching", "training", "evaluating", "publishing")
FAILED = ("failed", "invalid", "gates not passed", "canceled")
UNSEEN = ("just made", "to be suspended", "to be resumed")
DELETING = ("deleting", "complete and deleting")


def expected(suspended: str, complete: str, going_on: str, failed: str, deleting: str, unseen: str) -> dict[str, str]:
    told = {"suspended": suspended, "complete": complete, "holding": complete, "degraded": complete}
    for names, answer in (GOING_ON, going_on), (FAILED, failed), (DELETING, deleting), (UNSEEN, unseen):
        told |= dict.fromkeys(names, answer)
    assert told.keys() == STATES.keys()
    return told


def lua(script: str, job: dict[str, Any]) -> Any:
    """What a script makes of `obj`, with no more of Lua's libraries than Argo CD gives: the base, tables, and the time."""
    runtime = LuaRuntime(unpack_returned_tuples=True)
    runtime.execute("os = {date = os.date, time = os.time}; io, string, math, debug, package, require, dofile, loadfile = nil")
    runtime.globals().obj = runtime.table_from(job, recursive=True)
    return _plain(runtime.execute(script))


def _plain(value: Any) -> Any:
    if lua_type(value) != "table":
        return value
    keys = list(value.keys())
    return (
        [_plain(value[key]) for key in keys]
        if keys and keys == list(range(1, len(keys) + 1))
        else {key: _plain(value[key]) for key in keys}
    )


@pytest.mark.parametrize(
    ("state", "health"), expected("Suspended", "Healthy", "Progressing", "Degraded", "Progressing", "Progressing").items()
)
def test_argo_cd_knows_the_health(state: str, health: str) -> None:
    if state == "degraded":
        health = "Degraded"  # the job is complete, and its model does not do as well any more
    found = lua(HEALTH, STATES[state])
    assert found["status"] == health
    assert found["message"]


def test_argo_cd_is_told_why() -> None:
    assert lua(HEALTH, STATES["gates not passed"])["message"] == "GatesNotPassed: in words"
    assert lua(HEALTH, STATES["training"])["message"] == "in words"
    assert lua(HEALTH, STATES["deleting"])["message"] == "the job is being deleted"


def test_argo_cd_does_not_stumble_over_a_job_without_a_status() -> None:
    assert lua(HEALTH, job(None))["status"] == "Progressing"
    assert lua(HEALTH, job({}))["status"] == "Progressing"
    offered = lua(ACTIONS["discovery.lua"], job(None))
    assert {name for name, each in offered.items() if not each["disabled"]} == {"suspend", "terminate"}


@pytest.mark.parametrize(
    ("state", "offered"),
    expected("resume terminate", "", "suspend terminate", "retry", "suspend terminate", "suspend terminate").items(),
)
def test_argo_cd_offers_what_can_be_done(state: str, offered: str) -> None:
    if state == "to be suspended":
        offered = "resume terminate"
    if state == "complete and deleting":
        offered = ""
    actions = lua(ACTIONS["discovery.lua"], STATES[state])
    assert actions.keys() == {definition["name"] for definition in ACTIONS["definitions"]}
    assert {name for name, each in actions.items() if not each["disabled"]} == set(offered.split())


def act(name: str, before: dict[str, Any]) -> dict[str, Any]:
    (script,) = [definition["action.lua"] for definition in ACTIONS["definitions"] if definition["name"] == name]
    after = lua(script, before)
    after["status"] = before.get("status", {})  # Lua cannot tell an empty list from an empty map; Argo CD puts back what was there
    parse_job(after)  # what it leaves is still a job
    return dict(after)


def test_actions_of_argo_cd_do_what_the_operator_takes_them_for() -> None:
    assert act("suspend", STATES["training"])["spec"]["suspend"] is True
    assert act("resume", STATES["suspended"])["spec"]["suspend"] is False
    for before in STATES["training"], job(STATES["training"]["status"], annotations={"other": "x"}):
        assert not is_canceled(job_from(before))
        assert is_canceled(job_from(act("terminate", before)))
    assert act("terminate", job(None, annotations={"other": "x"}))["metadata"]["annotations"]["other"] == "x"


@pytest.mark.parametrize("annotations", [None, {"finetune.dev/cancel": "true"}, {"finetune.dev/retry": "before"}])
def test_retry_of_argo_cd_begins_another_attempt(annotations: dict[str, str] | None) -> None:
    status = {**STATES["failed"]["status"], "retrySeen": "before"}
    before = job(status, annotations=annotations)
    assert revival(job_from(before), NOW) is None
    after = job_from(act("retry", before))
    assert revival(after, NOW) is not None


def flux(name: str, job: dict[str, Any]) -> str:
    """The status by the expressions of a Kustomization, in the order in which Flux asks: deletion, generation, then the expressions."""
    (checks,) = yaml.safe_load((CHART / f"gitops/{name}.yaml").read_text())["spec"]["healthCheckExprs"]
    assert (checks["apiVersion"], checks["kind"]) == (job["apiVersion"], job["kind"])
    if "deletionTimestamp" in job["metadata"]:
        return "Terminating"
    if job["status"]["observedGeneration"] != job["metadata"]["generation"]:
        return "InProgress"
    verdicts = {kind: cel.evaluate(checks[kind], job) for kind in ("inProgress", "failed", "current")}
    assert set(verdicts.values()) <= {True, False}
    assert sum(verdicts.values()) == 1, "exactly one of the expressions should hold"
    return next({"inProgress": "InProgress", "failed": "Failed", "current": "Current"}[kind] for kind, holds in verdicts.items() if holds)


@pytest.mark.parametrize(
    ("state", "verdict"), expected("InProgress", "Current", "InProgress", "Failed", "Terminating", "InProgress").items()
)
def test_flux_waits_for_the_result(state: str, verdict: str) -> None:
    assert flux("flux-until-complete", STATES[state]) == verdict


@pytest.mark.parametrize("state", UNSEEN)
@pytest.mark.parametrize("name", ["flux-until-complete", "flux-until-accepted"])
def test_the_expressions_do_not_rest_on_the_order(name: str, state: str) -> None:
    """A version of Flux that does not look at the generation itself comes to the same."""
    (checks,) = yaml.safe_load((CHART / f"gitops/{name}.yaml").read_text())["spec"]["healthCheckExprs"]
    verdicts = {kind: cel.evaluate(checks[kind], STATES[state]) for kind in ("inProgress", "failed", "current")}
    assert verdicts == {"inProgress": True, "failed": False, "current": False}


@pytest.mark.parametrize(("state", "verdict"), expected("Current", "Current", "Current", "Failed", "Terminating", "InProgress").items())
def test_flux_waits_until_the_job_is_accepted(state: str, verdict: str) -> None:
    assert flux("flux-until-accepted", STATES[state]) == verdict


def kstatus(job: dict[str, Any]) -> str:
    """The published rule for kinds that kstatus does not know (sigs.k8s.io/cli-utils, pkg/kstatus): deletion, then the generation,
    then the conditions Reconciling and Stalled as they come, then Ready; Current where none of them says otherwise."""
    status = job.get("status", {})
    conditions = status.get("conditions", ())
    if "deletionTimestamp" in job["metadata"]:
        return "Terminating"
    if "observedGeneration" in status and status["observedGeneration"] != job["metadata"]["generation"]:
        return "InProgress"
    for condition in conditions:
        if condition["status"] == "True" and condition["type"] in ("Reconciling", "Stalled"):
            return "InProgress" if condition["type"] == "Reconciling" else "Failed"
    for condition in conditions:
        if condition["type"] == "Ready":
            return "Current" if condition["status"] == "True" else "InProgress"
    return "Current"


@pytest.mark.parametrize(
    ("state", "verdict"), expected("InProgress", "Current", "InProgress", "Failed", "Terminating", "InProgress").items()
)
def test_kstatus_knows_the_state_from_the_conditions(state: str, verdict: str) -> None:
    assert kstatus(STATES[state]) == verdict


def test_crd_gives_each_new_job_a_status_by_which_it_is_not_current() -> None:
    """Without one kstatus would take a job that nobody has looked at yet for Current."""
    crd = yaml.safe_load((CHART.parents[1] / "crds/finetunejobs.yaml").read_text())
    (version,) = crd["spec"]["versions"]
    assert version["schema"]["openAPIV3Schema"]["properties"]["status"]["default"] == {"observedGeneration": -1}
    assert kstatus(job(None)) == "Current"
