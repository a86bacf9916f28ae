"""What the head makes of the workers' progress."""

import pytest

from finetune_api.report import Report
from finetune_api.status import BestCheckpoint, CheckpointRef, Checkpoints, Metric, Progress
from finetune_trainer import following
from finetune_trainer.console import Console, duration, progress_line
from finetune_trainer.following import Following
from finetune_trainer.interruption import Interruption
from finetune_trainer.progress import Answer, WorkerProgress
from finetune_trainer.report import Reporter


class Head:
    """A head without server and workers."""

    def __init__(self) -> None:
        self.reporter = Reporter("u", 2, clock=lambda: "2026-01-01T00:00:00Z")
        self.interruption = Interruption()
        self.following = Following(self.reporter, Console(), self.interruption)
        self.reporter.start_stage("Train", "waiting", workers_wanted=2)

    @property
    def report(self) -> Report:
        return self.reporter.report

    def hear(self, group: str, start: int, step: int, **more: object) -> Answer:
        return self.following.take(WorkerProgress(group=group, start_step=start, step=step, total_steps=200, **more))  # type: ignore[arg-type]


def test_progress_becomes_the_report_without_a_new_revision() -> None:
    head = Head()
    before = head.report.revision
    checkpoint = CheckpointRef(step=50, uri="pvc://a/b")
    loss = Metric(name="train/loss", value=1.5, step=51)
    assert head.hear("a", 0, 51, epoch=0.5, tokens_per_second=100.0, eta_seconds=9, metrics=(loss,), checkpoint=checkpoint) == Answer()
    assert head.report.revision == before
    progress = head.report.progress
    assert progress is not None
    assert (progress.percent, progress.step, progress.total_steps, progress.epoch, progress.eta_seconds) == (25, 51, 200, 0.5, 9)
    assert head.report.metrics == (loss,)
    assert head.report.checkpoints is not None
    assert head.report.checkpoints.latest == checkpoint
    assert head.report.message == "step 51 of 200"


def test_a_new_group_that_goes_on_from_a_checkpoint_has_lost_what_came_after_it() -> None:
    head = Head()
    head.hear("a", 0, 57, trained_tokens=570)
    head.hear("b", 50, 50)
    head.hear("b", 50, 62, trained_tokens=120)
    head.hear("c", 60, 60)
    assert head.report.lost_steps == 7 + 2
    assert head.report.resumed_step is None
    assert head.report.usage is not None
    assert head.report.usage.trained_tokens == 570 + 120


def test_an_attempt_that_goes_on_counts_what_the_one_before_lost() -> None:
    head = Head()
    head.following.begin(Report(job_uid="u", attempt=1, progress=Progress(step=83, total_steps=200)))
    head.hear("a", 80, 81)
    assert (head.report.resumed_step, head.report.lost_steps) == (80, 3)


def test_workers_that_still_load_change_nothing() -> None:
    head = Head()
    head.following.take(WorkerProgress(group="a"))
    assert head.report.resumed_step is None
    assert head.report.lost_steps == 0


def test_evaluation_is_a_stage_once() -> None:
    head = Head()
    head.hear("a", 0, 200, stage="Evaluate", message="measuring")
    revision = head.report.revision
    assert [stage.state for stage in head.report.stages] == ["Succeeded", "Succeeded", "Running", "Pending"]
    assert head.report.workers_wanted == 2
    head.hear("a", 0, 200, stage="Evaluate", message="measured")
    assert head.report.revision == revision


def test_the_best_checkpoint_is_reported_beside_the_newest() -> None:
    head = Head()
    latest = CheckpointRef(step=50, uri="pvc://a/50")
    best = BestCheckpoint(step=20, uri="pvc://a/20", metric="validation/loss", value=1.25)
    head.hear("a", 0, 51, checkpoint=latest, best_checkpoint=best)
    assert head.report.checkpoints == Checkpoints(latest=latest, best=best)
    head.following.take(WorkerProgress(group="b"))
    assert head.report.checkpoints == Checkpoints(latest=latest, best=best)


def test_each_warning_is_passed_on_once_and_at_once() -> None:
    head = Head()
    revision = head.report.revision
    head.hear("a", 0, 1, warnings=("short",))
    assert (head.report.warnings, head.report.revision) == (("short",), revision + 1)
    head.hear("b", 0, 2, warnings=("short", "slow"))
    head.hear("b", 0, 3, warnings=("short", "slow"))
    assert (head.report.warnings, head.report.revision) == (("short", "slow"), revision + 2)
    head.hear("c", 0, 4, warnings=tuple(f"warning {number}" for number in range(8)))
    assert len(head.report.warnings) == 8


def test_the_call_to_stop_is_passed_on() -> None:
    head = Head()
    head.interruption.requested = True
    assert head.hear("a", 0, 1) == Answer(stop=True)


def test_the_call_to_regroup_is_passed_on_until_there_is_another_group() -> None:
    head = Head()
    head.hear("a", 0, 1)
    head.following.regroup = True
    assert head.hear("a", 0, 2) == Answer(regroup=True)
    assert head.hear("b", 2, 2) == Answer()


def test_only_the_gpus_of_those_that_take_part_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs for 10 s, then two for 5 s: 50."""
    seconds = 100.0
    monkeypatch.setattr(following.time, "monotonic", lambda: seconds)
    head = Head()
    head.following.workers_joined(4, on_gpus=True)
    head.hear("a", 0, 1, processes=4)
    seconds += 10
    head.hear("b", 1, 1, processes=2)
    seconds += 5
    head.following.workers_released()
    assert head.report.usage is not None
    assert head.report.usage.gpu_seconds == 50.0
    assert head.following.processes == 2


def test_workers_that_answer_change_nothing_that_is_known_of_the_training() -> None:
    head = Head()
    head.hear("a", 0, 57, trained_tokens=570)
    known = head.report
    words, warning = "step-57, suite task: 3 of 9 answered", "suite task: 1 of 9 prompts leave no room for an answer"
    told = WorkerProgress(group="b", stage="Evaluate", message=words, answered=3, cases=9, warnings=(warning,))
    assert head.following.take(told) == Answer()
    assert (head.report.message, head.report.warnings) == (words, (warning,))
    assert (head.report.progress, head.report.metrics, head.report.lost_steps) == (known.progress, known.metrics, 0)


def test_metrics_of_earlier_progress_stay() -> None:
    head = Head()
    head.hear("a", 0, 10, metrics=(Metric(name="validation/loss", value=2.0, step=10),))
    head.hear("a", 0, 11, metrics=(Metric(name="train/loss", value=1.0, step=11),))
    assert {metric.name: metric.value for metric in head.report.metrics} == {"validation/loss": 2.0, "train/loss": 1.0}


def test_the_line_for_people() -> None:
    progress = Progress(step=120, total_steps=600, tokens_per_second=2310.4, eta_seconds=180)
    metrics = {"train/loss": 1.2345, "train/learningRate": 1.8e-4}
    assert progress_line(progress, metrics) == "step 120/600  loss 1.234  lr 1.8e-04  2,310 tok/s  eta 3 min"
    assert progress_line(Progress(step=0, total_steps=600), {}) == "step 0/600"


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")])
def test_a_time_as_people_say_it(seconds: int, words: str) -> None:
    assert duration(seconds) == words


def last_step(head: Head) -> str | None:
    progress = head.report.progress
    assert progress is not None
    return progress.last_step_time


def test_a_step_is_to_be_expected_only_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(f"2026-01-01T00:00:{second:02}Z" for second in range(60))
    monkeypatch.setattr(following, "utc_now", lambda: next(times))
    head = Head()
    head.hear("a", 0, 0)
    assert last_step(head) is None
    head.hear("a", 0, 1, stepping=True)
    first = last_step(head)
    assert first is not None
    head.hear("a", 0, 1, stepping=True)
    assert last_step(head) == first
    head.hear("a", 0, 2, stepping=True)
    assert last_step(head) not in (None, first)
    head.hear("a", 0, 2, stepping=False)
    assert last_step(head) is None


def test_workers_that_are_silent_or_gone_are_expected_to_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(following.time, "monotonic", lambda: now[0])
    head = Head()
    head.hear("a", 0, 1, stepping=True)
    now[0] += following.SILENT_SECONDS
    head.following.look()
    assert last_step(head) is not None
    now[0] += 1
    head.following.look()
    assert last_step(head) is None
    head.hear("a", 0, 2, stepping=True)
    assert last_step(head) is not None
    head.following.workers_released()
    assert last_step(head) is None


def test_what_was_said_last_is_kept_for_a_failure_to_be_told_with() -> None:
    said = Console()
    for number in range(100):
        said.say(f"line {number}")
    assert said.tail.splitlines() == [f"line {number}" for number in range(60, 100)]
