"""How often the status of a job that runs is written, and what never waits: on a clock of its own, woken as often as one likes."""

import itertools
from dataclasses import replace

import pytest
from tests.builders import SETTINGS, Clock, at, make_pod, make_report, raw_job, stages
from tests.fakes import KEY, FakeCluster, FakeKubelet, Object, drive, told
from tests.unit.operator.looks import BEGUN, HEAD, PENDING_HEAD, PREPARING, condition, step

from finetune_api import LABEL_ROLE
from finetune_api.reasons import Reason
from finetune_api.report import Report, termination_message
from finetune_api.status import Evaluation, GateResult, Progress, Status
from finetune_operator.observed import Waiting
from finetune_operator.reconcile import reconcile
from finetune_operator.times import rfc3339

FOUR = {"compute": {"workers": {"min": 4, "max": 4}}, "training": {"globalBatchSize": 4}}
ELASTIC = {"compute": {"workers": {"min": 1, "max": 4}}, "training": {"globalBatchSize": 4}}
CREW = tuple(make_pod("worker", index=index) for index in range(4))
WANTS = make_report("Train", workers_wanted=4)


def begun(**spec) -> Status:
    """Workers are wanted, up to four, and none runs: written at T0."""
    status = step(PREPARING, HEAD, report=WANTS, **spec)
    assert status.workers_wanted > status.workers_ready == 0
    return status


def test_workers_that_come_are_counted_every_poll() -> None:
    status = begun(**FOUR)
    assert step(status, HEAD, CREW[0], report=WANTS, now=at(1), **FOUR) == status
    assert step(status, HEAD, *CREW[:3], report=WANTS, now=at(9), **FOUR) == status
    three = step(status, HEAD, *CREW[:3], report=WANTS, now=at(10), **FOUR)
    assert (three.workers_ready, three.message) == (3, "3 of 4 workers run")
    assert three.condition("WorkersReady").message == "3 of 4 workers run"  # type: ignore[union-attr]


def test_that_all_workers_run_is_told_within_a_poll_and_at_once_where_they_were_waited_for_for_longer() -> None:
    status = begun(**FOUR)
    assert step(status, HEAD, *CREW, report=WANTS, now=at(9), **FOUR) == status
    all_run = step(status, HEAD, *CREW, report=WANTS, now=at(10), **FOUR)
    assert (all_run.workers_ready, condition(all_run, "WorkersReady")) == (4, ("True", "Training"))
    three = step(status, HEAD, *CREW[:3], report=WANTS, now=at(10), **FOUR)
    waited = step(three, HEAD, *CREW, report=WANTS, now=at(11), **FOUR)
    assert (waited.workers_ready, waited.attempt.waiting_time) == (4, None)


def test_a_worker_that_is_lost_from_all_is_told_at_once_and_those_after_it_every_poll() -> None:
    all_run = step(begun(**FOUR), HEAD, *CREW, report=WANTS, now=at(100), **FOUR)
    broken = step(all_run, HEAD, *CREW[:3], report=WANTS, now=at(101), **FOUR)
    assert (broken.workers_ready, condition(broken, "WorkersReady")) == (3, ("False", "WorkersLost"))
    assert step(broken, HEAD, *CREW[:2], report=WANTS, now=at(102), **FOUR) == broken
    assert step(broken, HEAD, *CREW[:2], report=WANTS, now=at(111), **FOUR).workers_ready == 2


def test_an_elastic_job_tells_within_a_poll_that_it_may_train_and_at_once_where_workers_were_waited_for_for_longer() -> None:
    status = begun(**ELASTIC)
    assert step(status, HEAD, CREW[0], report=WANTS, now=at(1), **ELASTIC) == status
    may_train = step(status, HEAD, CREW[0], report=WANTS, now=at(10), **ELASTIC)
    assert (may_train.workers_ready, condition(may_train, "WorkersReady")) == (1, ("True", "Training"))
    assert step(may_train, HEAD, *CREW, report=WANTS, now=at(19), **ELASTIC) == may_train
    assert step(may_train, HEAD, *CREW, report=WANTS, now=at(20), **ELASTIC).workers_ready == 4


def test_a_stage_that_a_poll_sees_the_end_of_is_not_written_and_one_that_lasts_is_within_a_poll() -> None:
    status = step(begun(), HEAD, *CREW[:2], report=make_report("Train"), now=at(10))
    evaluating = make_report("Evaluate")
    assert step(status, HEAD, *CREW[:2], report=evaluating, now=at(12)) == status
    assert step(status, HEAD, *CREW[:2], report=evaluating, now=at(19)) == status
    lasting = step(status, HEAD, *CREW[:2], report=evaluating, now=at(20))
    assert (lasting.phase, lasting.stages, condition(lasting, "Trained")) == ("Evaluating", stages("Evaluate"), ("True", "Succeeded"))
    publishing = step(status, HEAD, report=make_report("Publish"), now=at(13))
    assert (publishing.phase, publishing.workers_wanted) == ("Publishing", 0), "the workers' GPUs are let go at once"


def test_a_stage_that_wants_workers_is_written_at_once() -> None:
    assert step(BEGUN, HEAD, report=make_report("Prepare"), now=at(1)) == BEGUN
    assert step(BEGUN, HEAD, report=make_report("Train"), now=at(2)).workers_wanted == 2


def test_what_stands_in_the_way_is_told_at_once_and_that_it_no_longer_does() -> None:
    status = begun()
    stuck = replace(CREW[1], phase="Pending", waiting=Waiting(Reason.UNSCHEDULABLE, "no node has 8 GPUs"))
    waits = step(status, HEAD, CREW[0], stuck, report=make_report("Train"), now=at(3))
    assert condition(waits, "Ready") == ("False", "Unschedulable")
    assert condition(step(waits, HEAD, *CREW[:2], report=make_report("Train"), now=at(4)), "Ready") == ("False", "Training")


def test_a_gate_that_is_passed_is_told_at_once() -> None:
    """There is an Event for it, and what has been measured is worth more than a moment's write."""
    gated = {"evaluation": {"gates": [{"metric": "validation/loss", "atMost": 2.0}]}}
    status = step(begun(**gated), HEAD, *CREW[:2], report=make_report("Train"), now=at(10), **gated)
    gate = GateResult(metric="validation/loss", verdict="Passed", observed=1.5, required="at most 2")
    passed = make_report("Evaluate", evaluation=Evaluation(gates=(gate,)))
    assert condition(step(status, HEAD, *CREW[:2], report=passed, now=at(11), **gated), "GatesPassed") == ("True", "GatesPassed")


def test_that_the_head_is_there_or_runs_waits_until_a_poll_has_passed() -> None:
    since = {"name": "head", "state": {"running": {"startedAt": rfc3339(at(5))}}}
    for head in (PENDING_HEAD, HEAD, make_pod(containerStatuses=[since])):
        assert step(BEGUN, head, now=at(9)) == BEGUN
        assert step(BEGUN, head, now=at(10)).attempt.head_seen


@pytest.mark.parametrize("runs", [False, True])
async def test_a_head_that_goes_within_the_first_poll_is_made_again_and_one_that_goes_later_is_counted(runs: bool) -> None:
    cluster = FakeCluster(Clock(), raw_job())
    kubelet = FakeKubelet(cluster, schedulable=lambda pod: runs)
    for _ in range(3):  # within the first poll
        await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
        kubelet.step()
        await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
        kubelet.vanish(cluster.objects["Pod", "bot-1-head"])
        cluster.clock.advance(2)
    assert (cluster.status.attempt.number, cluster.made.count(("Pod", "bot-1-head"))) == (1, 3)
    cluster.clock.advance(SETTINGS.poll_seconds)
    for _ in range(2):
        await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
    assert cluster.status.attempt.head_seen
    kubelet.vanish(cluster.objects["Pod", "bot-1-head"])
    await reconcile(KEY, cluster, SETTINGS, cluster.clock.now)
    assert (cluster.status.attempt.preemptions, cluster.status.attempt.end_reason) == (1, "HeadLost")


class World:
    """A job of so many workers, whose operator is woken every second, as by the events of its pods."""

    def __init__(self, workers: int, gpus: int = 0) -> None:
        each = {"resourcesPerWorker": {"nvidia.com/gpu": gpus}} if gpus else {}
        spec = {"compute": {"workers": {"min": workers, "max": workers}, **each}, "training": {"globalBatchSize": workers}}
        self.cluster = FakeCluster(Clock(), raw_job(**spec))
        self.kubelet = FakeKubelet(self.cluster)

    @property
    def statuses(self) -> int:
        return self.cluster.writes.count("patch status")

    async def trains(self, workers: int) -> None:
        """The head asks for its workers, and they are made."""
        await drive(self.cluster, self.kubelet, until=lambda: bool(self.cluster.reports))
        self.says(make_report("Train", workers_wanted=workers))
        await reconcile(KEY, self.cluster, SETTINGS, self.cluster.clock.now)
        assert len(self.workers) == workers

    @property
    def workers(self) -> list[Object]:
        return [pod for pod in self.cluster.pods if pod["metadata"]["labels"][LABEL_ROLE] == "worker"]

    def says(self, report: Report) -> None:
        (head,) = (pod for pod in self.cluster.pods if pod["metadata"]["labels"][LABEL_ROLE] == "head")
        self.cluster.reports[head["metadata"]["uid"]] = report

    def ends(self, report: Report) -> None:
        """The head ends, and leaves its report."""
        (head,) = (pod for pod in self.cluster.pods if pod["metadata"]["labels"][LABEL_ROLE] == "head")
        self.kubelet.end(head, 0, termination_message(report), "Completed")

    async def second(self) -> float | None:
        self.cluster.clock.advance(1)
        return await reconcile(KEY, self.cluster, SETTINGS, self.cluster.clock.now)


STAGES = (("Prepare", 0), ("Train", 2), ("Evaluate", 2), ("Publish", 0))


async def life(seconds: int) -> tuple[World, list[str]]:
    """A life of which each part lasts so long: the head starts, the workers do, the stages; and the phase that the job has each second."""
    world, phases = World(2), []

    async def passes() -> None:
        for _ in range(seconds):
            await world.second()
            phases.append(str(world.cluster.status.phase))

    await passes()
    for pod in world.cluster.pods:
        pod["status"] = {"phase": "Running", "podIP": "10.0.0.1"}
    for stage, workers in STAGES:
        world.says(make_report(stage, workers_wanted=workers))
        await passes()
        for pod in world.workers:
            pod["status"] = {"phase": "Running", "podIP": "10.0.0.1"}
            if "deletionTimestamp" in pod["metadata"]:
                world.kubelet.vanish(pod)
        if stage == "Train":
            await passes()
    world.ends(make_report("Publish", outcome="Succeeded", stages=stages("Publish", ended=True)))
    await passes()
    world.cluster.collect_garbage()
    assert (phases[-1], list(world.cluster.objects)) == ("Complete", [("Pod", "bot-1-head")])
    return world, phases


async def test_a_life_costs_fifteen_writes() -> None:
    """4 statuses, 2 Events, 4 objects, 3 pods, 2 deletions."""
    world, phases = await life(1)
    assert [phase for phase, _ in itertools.groupby(phases)] == ["Pending", "Training", "Publishing", "Complete"]
    assert (world.statuses, len(world.cluster.events), len(world.cluster.writes) - world.statuses) == (4, 2, 9)


async def test_every_stage_that_lasts_is_seen_within_a_poll_and_a_life_of_such_costs_few_writes_more() -> None:
    """Each phase has 30 seconds, the training 60: its workers take half of them to come."""
    world, phases = await life(30)
    lengths = {phase: len(list(each)) for phase, each in itertools.groupby(phases)}
    assert list(lengths) == ["Pending", "Preparing", "Training", "Evaluating", "Publishing", "Complete"]
    assert lengths == {"Pending": 30, "Preparing": 30, "Training": 60, "Evaluating": 30, "Publishing": 30, "Complete": 30}
    # Beside the four: the head is there, it runs and answers, all workers run, Evaluating.
    assert (world.statuses, len(world.cluster.events), len(world.cluster.writes) - world.statuses) == (8, 2, 9)


async def test_sixty_four_workers_that_come_one_by_one_are_seven_statuses() -> None:
    world = World(64)
    await world.trains(64)
    before = world.statuses
    for pod in world.workers:
        pod["status"] = {"phase": "Running", "podIP": "10.0.0.1"}
        await world.second()
    assert world.statuses - before == 7, "every 10 of 64 seconds, and when all run"
    assert (world.cluster.status.workers_ready, world.cluster.status.message) == (64, "in Train")


async def test_a_count_that_waits_is_written_without_a_further_event() -> None:
    world = World(4)
    await world.trains(4)
    for pod in world.workers[:2]:
        pod["status"] = {"phase": "Running", "podIP": "10.0.0.1"}
    wait = await world.second()
    assert (world.cluster.status.workers_ready, wait) == (0, SETTINGS.poll_seconds - 1), "a poll after the last write"
    world.cluster.clock.advance(wait)
    await reconcile(KEY, world.cluster, SETTINGS, world.cluster.clock.now)
    assert world.cluster.status.workers_ready == 2


@pytest.mark.parametrize(("gpus", "seconds"), [(0, 1), (1, 1), (1, 7), (1, 15)])
async def test_a_job_that_trains_costs_six_writes_a_minute_however_often_it_is_looked_at(gpus: int, seconds: int) -> None:
    """A step takes so many seconds, and the workers hold so many GPUs, whose time is counted too."""
    world = World(2, gpus)
    await world.trains(2)
    for pod in world.workers:
        pod["status"] = {"phase": "Running", "podIP": "10.0.0.1", "startTime": rfc3339(world.cluster.clock.now)}
    await told(world.cluster)
    assert world.cluster.status.workers_ready == 2
    world.cluster.writes.clear()
    world.cluster.events.clear()
    for number in range(1, 301):
        progress = Progress(step=number // seconds, total_steps=1000, percent=number // 10)
        world.says(make_report(message=f"step {number // seconds}", progress=progress))
        await world.second()
    assert set(world.cluster.writes) == {"patch status"}
    assert 28 <= len(world.cluster.writes) <= 30, "five minutes, every ten seconds"
    assert world.cluster.events == {}
    usage = world.cluster.status.usage
    assert (usage.gpu_seconds if usage else 0) >= 290 * 2 * gpus
