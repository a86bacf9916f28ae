"""A whole job in this process: the head's stages and the workers' function as they are, with Ray left out.

What Ray does (start processes, bring them together) is tested with Ray; this is for the many jobs that differ in what they compute.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_api.report import Report
from finetune_api.v1alpha1 import FineTuneJob, stages_of
from finetune_trainer import crew, run, worker_group
from finetune_trainer.attempt import Attempt
from finetune_trainer.console import Console
from finetune_trainer.environment import Environment
from finetune_trainer.following import Following
from finetune_trainer.interruption import Interruption
from finetune_trainer.progress import WorkerProgress
from finetune_trainer.report import Reporter
from finetune_trainer.worker import Worker


@dataclass
class Finished:
    """What a job left."""

    report: Report
    told: list[WorkerProgress]
    """Every state that the workers told of."""

    def losses(self) -> list[float]:
        """The training loss after each step that was told of, in order."""
        latest: dict[int, float] = {}
        for progress in self.told:
            for metric in progress.metrics:
                if metric.name == "train/loss" and metric.step is not None:
                    latest[metric.step] = metric.value
        return [latest[step] for step in sorted(latest)]


class KilledError(BaseException):
    """The workers' process is gone."""


class NoRay:
    """In place of the Ray head."""

    def __init__(self, *_: object) -> None:
        pass

    def wait_ready(self) -> None:
        """It is."""

    def stop(self) -> None:
        """It has."""


def run_job(job: FineTuneJob, volumes: Path, monkeypatch: pytest.MonkeyPatch, *, attempt: int = 1, kill_at: int | None = None) -> Finished:
    """Run one attempt to its end. With `kill_at` the workers are killed once they have told of so many steps: raises KilledError.

    `volumes` holds claims/<claim>, configmaps/<name> and secrets/<name>, as a pod mounts them.
    """
    reporter, console, interruption = Reporter(job.metadata.uid, attempt, stages=stages_of(job.spec)), Console(), Interruption()
    following, told = Following(reporter, console, interruption), list[WorkerProgress]()
    folder = volumes / "attempts" / f"{job.metadata.uid}-{attempt}"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    (folder / "token").write_text("token")
    environment = Environment(folder / "job.json", attempt, folder / "token", "127.0.0.1", 6379, 8000, volumes, local=True)

    class Sender:
        """In place of the one that sends over HTTP."""

        stop_requested = regroup_requested = False

        def __init__(self, *_: Any) -> None:
            pass

        def post(self, progress: WorkerProgress) -> None:
            told.append(progress)
            following.take(progress)
            if kill_at is not None and progress.step >= kill_at:
                raise KilledError

        def close(self) -> None:
            """Nothing is open."""

    with monkeypatch.context() as patch:
        without_ray(patch, environment, folder)
        patch.setattr("finetune_trainer.progress.ProgressSender", Sender)
        run.run_stages(Attempt(environment, job, reporter, console, NoRay(), following, interruption))  # type: ignore[arg-type]
    return Finished(reporter.report, told)


def without_ray(patch: pytest.MonkeyPatch, environment: Environment, folder: Path) -> None:
    """Have the workers' function run in this process, where the head calls for workers."""

    def fit(compute: Any, config: dict[str, Any], name: str, scratch: Path, on_worker: Any = None) -> None:
        (on_worker or worker_group._train_on_worker)(config)

    patch.setattr(crew, "driver", lambda _: nullcontext())
    patch.setattr(crew, "wait_for_workers", lambda *_, **__: 1)
    patch.setattr(worker_group, "fit", fit)
    patch.setattr(worker_group, "this_worker", Worker)
    patch.setattr(worker_group, "_first_of_each_node", lambda worker, call: call())
    patch.setattr(crew, "_Background", _Now)
    patch.setattr(Interruption, "listen", lambda self: None)
    variables = {
        "FINETUNE_JOB_FILE": environment.job_file,
        "FINETUNE_ATTEMPT": environment.attempt,
        "FINETUNE_TOKEN_FILE": environment.token_file,
        "FINETUNE_HEAD_HOST": "127.0.0.1",
        "FINETUNE_REPORT_PORT": environment.report_port,
        "FINETUNE_VOLUMES": environment.volumes,
        "FINETUNE_LOCAL": 1,
        worker_group.SCRATCH_VARIABLE: folder / "scratch",
    }
    for name, value in variables.items():
        patch.setenv(name, str(value))


class _Now:
    """In place of a thread of its own."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def wait(self, *_: Any) -> None:
        self._call()
