"""planOnly: a job whose head finds out what the training would take, and ends there."""

from tests.builders import SETTINGS, Clock, at, make_job, make_report, raw_job
from tests.fakes import KEY, FakeCluster, FakeKubelet
from tests.unit.operator.looks import BEGUN, HEAD, condition, step

from finetune_api.report import termination_message
from finetune_api.status import Plan, Stage
from finetune_api.v1alpha1 import stages_of
from finetune_operator.plan import desired_objects
from finetune_operator.reconcile import reconcile

PLAN = Plan(parameters=1000, trained_parameters=10, steps=120, fits=True)
PREPARED = (Stage(name="Prepare", state="Succeeded"),)


def test_a_plan_is_one_stage() -> None:
    spec = make_job(planOnly=True).spec
    assert spec is not None
    assert stages_of(spec) == ("Prepare",)


def test_a_plan_ends_complete_with_nothing_trained() -> None:
    report = make_report("Prepare", outcome="Succeeded", message="fits", plan=PLAN)
    status = step(BEGUN, HEAD, report=report.model_copy(update={"stages": PREPARED}), now=at(60), planOnly=True)
    assert (status.phase, status.plan, status.message) == ("Complete", PLAN, "fits")
    assert [condition(status, kind) for kind in ("Complete", "DataReady")] == [("True", "Planned"), ("True", "Succeeded")]
    assert {condition(status, kind) for kind in ("Trained", "Evaluated", "Published")} == {("False", "Planned")}


def test_its_head_gets_no_workers_whatever_it_asks_for() -> None:
    status = step(BEGUN, HEAD, report=make_report("Prepare", workers_wanted=2), planOnly=True)
    assert status.workers_wanted == 0
    kinds = [
        manifest["metadata"]["name"] for manifest in desired_objects(make_job(planOnly=True), status, SETTINGS) if manifest["kind"] == "Pod"
    ]
    assert kinds == ["bot-1-head"]


async def test_its_life() -> None:
    cluster = FakeCluster(Clock(), raw_job(planOnly=True))
    kubelet = FakeKubelet(cluster)
    for _ in range(20):
        delay = await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
        if delay is None:
            break
        running = [pod for pod in cluster.pods if pod["status"]["phase"] == "Running"]
        if running:
            report = make_report("Prepare", outcome="Succeeded", plan=PLAN).model_copy(update={"stages": PREPARED})
            kubelet.end(running[0], 0, termination_message(report), "Completed")
        else:
            kubelet.step()
        cluster.clock.advance(delay)
    assert (cluster.status.phase, cluster.status.plan, cluster.status.usage) == ("Complete", PLAN, None)
    assert cluster.names("Pod") == {"bot-1-head"}
    assert [event.reason for event in cluster.events.values()][-1] == "Planned"
