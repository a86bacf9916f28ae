"""The head's way through its stages, with the cluster and the publishing played: what a stop, a crash or a failure in between leaves."""

import json
import math
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_api.monitoring import MonitoringPlan
from finetune_api.reasons import Reason
from finetune_api.status import Artifact, CheckpointRef, Evaluation, Resolved, Usage
from finetune_api.v1alpha1 import parse_job
from finetune_trainer import crew, run, worker_group
from finetune_trainer.attempt import Attempt, Preparation
from finetune_trainer.console import Console
from finetune_trainer.crew import Crew
from finetune_trainer.environment import Environment
from finetune_trainer.errors import JobError
from finetune_trainer.following import Following
from finetune_trainer.interruption import InterruptedRunError, Interruption
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.progress import WorkerProgress
from finetune_trainer.report import Reporter
from finetune_trainer.result import Result
from finetune_trainer.run import earlier_report, publish_result, run_stages, train
from finetune_trainer.storage import Storage

RESULT = Result(steps=10, trained_tokens=100, before={"validation": 2.0}, after={"validation": 1.0}, config={})
ARTIFACT = Artifact(kind="adapter", uri="file:///out/adapter", digest="sha256:a", bytes=1)


class RayHead:
    """A Ray head that is ready."""

    def wait_ready(self) -> None:
        """It is."""


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    spec = {
        "model": {"source": "file:///model"},
        "data": {"train": {"source": "file:///train.jsonl"}},
        "method": {"lora": {}},
        "output": {"storage": f"file://{tmp_path}/out"},
    }
    metadata = {"name": "bot", "namespace": "team", "uid": "u1"}
    job = parse_job({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": spec}, local=True)
    (tmp_path / "job.json").write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    environment = Environment(tmp_path / "job.json", 1, tmp_path / "token", "127.0.0.1", 6379, 8000, tmp_path, local=True)
    reporter, console, interruption = Reporter("u1", 1), Console(), Interruption()
    reporter.update(evaluation=Evaluation())
    following = Following(reporter, console, interruption)
    return Attempt(environment, job, reporter, console, RayHead(), following, interruption)  # type: ignore[arg-type]


@pytest.fixture
def preparation(attempt: Attempt) -> Preparation:
    resolved = Resolved(model_revision="r", data_digest="sha256:d", config_digest="sha256:c")
    return Preparation(attempt.job, BaseModel("/model"), None, None, resolved, {}, "prepared")  # type: ignore[arg-type]


@pytest.mark.parametrize("monitoring", [False, True])
def test_a_server_that_the_profile_does_not_allow_is_found_before_anything_is_asked_or_written(
    attempt: Attempt, tmp_path: Path, *, monitoring: bool
) -> None:
    told = {"metadata": {"endpointBounds": {"profile": "small", "secrets": ["aws", "s3"], "allowed": []}}}
    attempt.environment.job_file.write_text(json.dumps(told))
    (tmp_path / "secrets" / "s3").mkdir(parents=True)
    (tmp_path / "secrets" / "s3" / "endpoint").write_text("https://evil.example.org")
    if monitoring:
        plan = MonitoringPlan.model_construct()
        attempt.job = attempt.job.model_copy(update={"spec": attempt.job.spec.model_copy(update={"monitoring": plan})})
    with pytest.raises(JobError) as refused:
        run_stages(attempt)
    assert refused.value.reason == Reason.PROFILE_VIOLATED
    assert not (tmp_path / "out").exists()
    assert attempt.reporter.report.stages == Reporter("u1", 1).report.stages


def published(*_: Any) -> tuple[Artifact, ...]:
    return (ARTIFACT,)


def test_a_stop_while_workers_are_waited_for_again_ends_the_head_at_once(
    attempt: Attempt, preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = 0

    def wait_for_workers(*_: Any) -> int:
        nonlocal waits
        waits += 1
        if waits == 2:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the head went on waiting")
        return 1

    def fit(*_: Any) -> None:
        attempt.following.take(WorkerProgress(group="a", start_step=0, step=3, total_steps=10))

    monkeypatch.setattr(crew, "driver", lambda _: nullcontext())
    monkeypatch.setattr(crew, "wait_for_workers", wait_for_workers)
    monkeypatch.setattr(worker_group, "fit", fit)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(InterruptedRunError), Crew(attempt) as workers:
            train(attempt, preparation, workers)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert waits == 2


def test_workers_that_always_leave_before_a_step_end_the_attempt(
    attempt: Attempt, preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = 0

    def fit(*_: Any) -> None:
        nonlocal groups
        groups += 1
        step = min(groups, 5)  # the first five groups come a step further each
        saved = CheckpointRef(step=step, uri="pvc://a/b")
        attempt.following.take(WorkerProgress(group=str(groups), start_step=step, step=step, total_steps=10, checkpoint=saved))

    monkeypatch.setattr(crew, "driver", lambda _: nullcontext())
    monkeypatch.setattr(crew, "wait_for_workers", lambda *_: 1)
    monkeypatch.setattr(worker_group, "fit", fit)
    monkeypatch.setattr(attempt.interruption, "listen", lambda: None)
    with pytest.raises(JobError) as raised, Crew(attempt) as workers:
        train(attempt, preparation, workers)
    assert raised.value.reason == Reason.WORKERS_LOST
    assert groups == 5 + crew.MAX_FRUITLESS


@pytest.mark.parametrize("progress", [True, False])
def test_workers_that_are_lost_again_and_again_end_the_attempt_only_without_progress(
    progress: bool, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group is lost for good; with progress the third comes to the end."""
    done: list[str] = []

    def work(group: str, _: int) -> None:
        done.append(group)
        if len(done) < 3:
            raise RuntimeError("the group failed") from JobError(Reason.WORKERS_LOST, "four times")

    monkeypatch.setattr(crew, "driver", lambda _: nullcontext())
    monkeypatch.setattr(crew, "wait_for_workers", lambda *_: 1)
    monkeypatch.setattr(attempt.interruption, "listen", lambda: None)
    with Crew(attempt) as workers:
        if progress:
            assert workers.run(work, lambda: len(done) if len(done) == 3 else None, lambda: len(done)) == 3
            return
        with pytest.raises(RuntimeError, match="the group failed"):
            workers.run(work, lambda: None)
    assert len(done) == 1


@pytest.mark.parametrize(("labels", "seconds"), [({}, 1800), ({"kueue.x-k8s.io/queue-name": "team"}, math.inf)])
def test_the_time_in_a_queue_is_for_the_operator_to_count(
    labels: dict[str, str], seconds: float, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    metadata = attempt.job.metadata.model_copy(update={"labels": labels})
    attempt.job = attempt.job.model_copy(update={"metadata": metadata})
    monkeypatch.setattr(crew, "driver", lambda _: nullcontext())
    monkeypatch.setattr(crew, "wait_for_workers", lambda _, patience, __: waited.append(patience) or 1)
    monkeypatch.setattr(attempt.interruption, "listen", lambda: None)
    with Crew(attempt) as workers:
        assert workers.run(lambda *_: None, lambda: True)
    assert waited == [seconds]


def test_that_it_succeeded_is_kept_before_anything_is_removed(
    attempt: Attempt, preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise KilledError

    monkeypatch.setattr(run, "publish", published)
    monkeypatch.setattr(Storage, "remove", killed)
    with pytest.raises(KilledError):
        publish_result(attempt, preparation, RESULT)
    earlier = earlier_report(replace(attempt, reporter=Reporter("u1", 2)))
    assert earlier is not None
    assert (earlier.outcome, earlier.artifacts) == ("Succeeded", (ARTIFACT,))
    assert attempt.reporter.report.outcome is None


def test_leftovers_that_cannot_be_removed_are_not_worth_failing_for(
    attempt: Attempt, preparation: Preparation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any) -> None:
        raise JobError(Reason.STORAGE_UNAVAILABLE, "read only")

    monkeypatch.setattr(run, "publish", published)
    monkeypatch.setattr(Storage, "remove", refused)
    publish_result(attempt, preparation, RESULT)
    assert "result could not be removed: read only" in capsys.readouterr().out


def test_an_attempt_that_only_repeats_the_word_has_used_nothing(attempt: Attempt) -> None:
    usage = Usage(gpu_seconds=50.0, trained_tokens=100)
    attempt.reporter.update(artifacts=(ARTIFACT,), usage=usage, lost_steps=3)
    attempt.keep_report("Succeeded")
    later = replace(attempt, reporter=Reporter("u1", 2))
    run_stages(later)
    report = later.reporter.report
    assert (report.attempt, report.artifacts, report.usage, report.lost_steps) == (2, (ARTIFACT,), None, 0)
