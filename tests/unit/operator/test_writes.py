"""How often the status of a job that runs is written, and what never waits: on a clock of its own, woken as often as one likes."""

import pytest
from tests.builders import SETTINGS, Clock, at, make_pod, make_report, raw_job, stages
from tests.fakes import KEY, FakeCluster, FakeKubelet, Object, drive
from tests.unit.operator.looks import BEGUN, HEAD, PENDING_HEAD, PREPARING, condition, step

from finetune_api import LABEL_ROLE
from finetune_api.report import Report
from finetune_api.status import Progress, Status
from finetune_operator.reconcile import reconcile
from finetune_operator.times import rfc3339

FOUR = {"compute": {"workers": {"min": 4, "max": 4}}, "training": {"globalBatchSize": 4}}
ELASTIC = {"compute": {"workers": {"min": 1, "max": 4}}, "training": {"globalBatchSize": 4}}
CREW = tuple(make_pod("worker", index=index) for index in range(4))
WANTS = make_report("Train", workers_wanted=4)


def begun(**spec) -> Status:
    """Four workers are wanted, and none runs: written at T0."""
    status = step(PREPARING, HEAD, report=WANTS, **spec)
    assert (status.workers_wanted, status.workers_ready) == (4, 0)
    return status


def test_workers_that_come_are_counted_every_poll_and_told_when_they_are_all_there() -> None:
    status = begun(**FOUR)
    assert step(status, HEAD, CREW[0], report=WANTS, now=at(1), **FOUR) == status
    assert step(status, HEAD, *CREW[:3], report=WANTS, now=at(9), **FOUR) == status
    three = step(status, HEAD, *CREW[:3], report=WANTS, now=at(10), **FOUR)
    assert (three.workers_ready, three.message) == (3, "3 of 4 workers run")
    assert three.condition("WorkersReady").message == "3 of 4 workers run"  # type: ignore[union-attr]
    all_run = step(three, HEAD, *CREW, report=WANTS, now=at(11), **FOUR)
    assert (all_run.workers_ready, condition(all_run, "WorkersReady")) == (4, ("True", "Training"))


def test_a_worker_that_is_lost_from_all_is_told_at_once_and_those_after_it_every_poll() -> None:
    all_run = step(begun(**FOUR), HEAD, *CREW, report=WANTS, now=at(100), **FOUR)
    broken = step(all_run, HEAD, *CREW[:3], report=WANTS, now=at(101), **FOUR)
    assert (broken.workers_ready, condition(broken, "WorkersReady")) == (3, ("False", "WorkersLost"))
    assert step(broken, HEAD, *CREW[:2], report=WANTS, now=at(102), **FOUR) == broken
    assert step(broken, HEAD, *CREW[:2], report=WANTS, now=at(111), **FOUR).workers_ready == 2


def test_an_elastic_job_tells_at_once_when_it_may_train_and_when_all_run() -> None:
    status = begun(**ELASTIC)
    may_train = step(status, HEAD, CREW[0], report=WANTS, now=at(1), **ELASTIC)
    assert (may_train.workers_ready, condition(may_train, "WorkersReady")) == (1, ("True", "Training"))
    assert step(may_train, HEAD, *CREW[:3], report=WANTS, now=at(2), **ELASTIC) == may_train
    assert step(may_train, HEAD, *CREW, report=WANTS, now=at(3), **ELASTIC).workers_ready == 4


def test_a_stage_does_not_wait_for_workers_that_come() -> None:
    status = begun(**ELASTIC)
    evaluating = make_report("Evaluate", workers_wanted=4)
    assert step(status, HEAD, *CREW[:2], report=evaluating, now=at(1), **ELASTIC).stages == stages("Evaluate")


def test_that_the_head_is_there_waits_until_it_runs_or_a_poll_has_passed() -> None:
    assert step(BEGUN, PENDING_HEAD, now=at(9)) == BEGUN
    assert step(BEGUN, PENDING_HEAD, now=at(10)).attempt.head_seen
    assert step(BEGUN, HEAD, now=at(1)).attempt.head_seen


async def test_a_head_that_goes_before_it_runs_is_made_again_at_first_and_then_counted() -> None:
    cluster = FakeCluster(Clock(), raw_job())
    kubelet = FakeKubelet(cluster, schedulable=lambda pod: False)
    for _ in range(3):  # within the first poll
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
        await drive(self.cluster, self.kubelet, until=lambda: self.cluster.status.phase == "Preparing")
        self.says(make_report("Train", workers_wanted=workers))
        await reconcile(KEY, self.cluster, SETTINGS, self.cluster.clock.now)
        assert len(self.workers) == workers

    @property
    def workers(self) -> list[Object]:
        return [pod for pod in self.cluster.pods if pod["metadata"]["labels"][LABEL_ROLE] == "worker"]

    def says(self, report: Report) -> None:
        (head,) = (pod for pod in self.cluster.pods if pod["metadata"]["labels"][LABEL_ROLE] == "head")
        self.cluster.reports[head["metadata"]["uid"]] = report

    async def second(self) -> float | None:
        self.cluster.clock.advance(1)
        return await reconcile(KEY, self.cluster, SETTINGS, self.cluster.clock.now)


async def test_sixty_four_workers_that_come_one_by_one_are_eight_statuses() -> None:
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
    assert (world.cluster.status.workers_ready, wait) == (0, SETTINGS.poll_seconds)
    world.cluster.clock.advance(SETTINGS.poll_seconds)
    await reconcile(KEY, world.cluster, SETTINGS, world.cluster.clock.now)
    assert world.cluster.status.workers_ready == 2


@pytest.mark.parametrize(("gpus", "seconds"), [(0, 1), (1, 1), (1, 7), (1, 15)])
async def test_a_job_that_trains_costs_six_writes_a_minute_however_often_it_is_looked_at(gpus: int, seconds: int) -> None:
    """A step takes so many seconds, and the workers hold so many GPUs, whose time is counted too."""
    world = World(2, gpus)
    await world.trains(2)
    for pod in world.workers:
        pod["status"] = {"phase": "Running", "podIP": "10.0.0.1", "startTime": rfc3339(world.cluster.clock.now)}
    await world.second()
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
