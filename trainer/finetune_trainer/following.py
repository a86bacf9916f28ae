"""What the head makes of the workers' progress: the report, the lines for people, the call to stop."""

import time

from finetune_api.report import Report
from finetune_api.status import WARNINGS_MAX, Checkpoints, Progress, Usage
from finetune_trainer.console import Console
from finetune_trainer.interruption import Interruption
from finetune_trainer.progress import Answer, WorkerProgress, utc_now
from finetune_trainer.report import Reporter

SILENT_SECONDS = 30.0
"""Rank 0 tells of itself every second: one that does not is gone, or begins anew."""


class Following:
    """Follows the worker groups of one attempt. `take` is called by the HTTP server's thread, the rest by the head's main thread."""

    def __init__(self, reporter: Reporter, console: Console, interruption: Interruption) -> None:
        self._reporter, self._console, self._interruption = reporter, console, interruption
        self._group: str | None = None
        self._furthest = 0
        self._lost_steps = 0
        self._earlier_tokens = 0
        self._latest_tokens = 0
        self.processes = 0
        """That take part: of the group that trains, or that is about to."""
        self.regroup = False
        """Whether the workers should begin again with more of them."""
        self._on_gpus = False
        self._gpus_since: float | None = None
        self._heard = 0.0
        self._last_step: tuple[str, int, str] | None = None
        """Group and number of the last step, and when it was first heard of; None where no step is to be expected."""
        self._earlier_gpu_seconds = 0.0

    def begin(self, earlier: Report | None) -> None:
        """Know how far the attempt before had come."""
        self._furthest = earlier.progress.step if earlier and earlier.progress else 0

    def workers_joined(self, processes: int, *, on_gpus: bool) -> None:
        """They are held from now on, a GPU for each process where there are any."""
        self.processes, self._on_gpus, self._gpus_since = processes, on_gpus, time.monotonic()

    def workers_released(self) -> None:
        """They are held no more."""
        usage = self._usage()
        self._reporter.update(usage=usage)
        self._earlier_gpu_seconds, self._gpus_since = usage.gpu_seconds, None
        self.regroup = False
        self._expect_no_step()

    def look(self) -> None:
        """Where nothing is heard of the workers, they may be starting again: no step is to be expected of them."""
        if time.monotonic() - self._heard > SILENT_SECONDS:
            self._expect_no_step()

    def _expect_no_step(self) -> None:
        state = self._reporter.report.progress
        self._last_step = None
        if state is not None and state.last_step_time is not None:
            self._reporter.update(progress=state.model_copy(update={"last_step_time": None}))

    def _step_time(self, progress: WorkerProgress) -> str | None:
        """When the last step was first heard of, where another one is to be expected."""
        self._heard, known = time.monotonic(), self._last_step
        if not progress.stepping:
            self._last_step = None
        elif known is None or known[:2] != (progress.group, progress.step):
            self._last_step = progress.group, progress.step, utc_now()
        return self._last_step[2] if self._last_step else None

    def take(self, progress: WorkerProgress) -> Answer:
        """Make the newest progress the report's. Returns what the workers should do."""
        if progress.cases is not None:
            self._take_answers(progress)
            return Answer(self._interruption.requested, self.regroup)
        if progress.start_step is not None and progress.group != self._group:
            self._begin_group(progress, progress.start_step)
        state = Progress(
            percent=100 * progress.step // max(1, progress.total_steps),
            step=progress.step,
            total_steps=progress.total_steps,
            epoch=progress.epoch,
            tokens_per_second=progress.tokens_per_second,
            eta_seconds=progress.eta_seconds,
            last_update_time=utc_now(),
            last_step_time=self._step_time(progress),
        )
        self._furthest = max(self._furthest, progress.step)
        self._latest_tokens = progress.trained_tokens
        metrics = {metric.name: metric for metric in (*self._reporter.report.metrics, *progress.metrics)}
        self._reporter.update(
            progress=state,
            metrics=tuple(metrics.values()),
            checkpoints=self._checkpoints(progress),
            message=progress.message or f"step {state.step} of {state.total_steps}",
            usage=self._usage(),
        )
        self.warn(progress.warnings)
        if progress.stage == "Evaluate" and self._stage("Evaluate") == "Pending":
            self._reporter.start_stage("Evaluate", progress.message, workers_wanted=self._reporter.report.workers_wanted)
        if progress.stage == "Train" and progress.step:
            self._console.progress(state, {name: metric.value for name, metric in metrics.items()})
        return Answer(self._interruption.requested, self.regroup)

    def _take_answers(self, progress: WorkerProgress) -> None:
        """Workers that answer suites take no steps: what is known of the training stays as it is."""
        self._reporter.update(message=progress.message, usage=self._usage())
        self.warn(progress.warnings)

    def _checkpoints(self, progress: WorkerProgress) -> Checkpoints | None:
        """What is known of the checkpoints; a group that is only loading knows nothing new."""
        known = self._reporter.report.checkpoints
        return Checkpoints(latest=progress.checkpoint, best=progress.best_checkpoint) if progress.checkpoint else known

    def warn(self, warnings: tuple[str, ...]) -> None:
        """Pass on what is new, at once."""
        known = self._reporter.report.warnings
        new = tuple(text for text in warnings if text not in known)[: WARNINGS_MAX - len(known)]
        for text in new:
            self._console.say(text)
        if new:
            self._reporter.announce(warnings=(*known, *new))

    def _begin_group(self, progress: WorkerProgress, start_step: int) -> None:
        """Another worker group has loaded its state: what was done after the checkpoint that it goes on from is lost.

        From here on there is something to save: a call to stop is passed on to the workers.
        """
        self._interruption.at_once = False
        lost = max(0, self._furthest - start_step)
        self._lost_steps += lost
        self._earlier_tokens += self._latest_tokens
        if self._group is None:
            self._reporter.update(resumed_step=start_step or None)
        if start_step:
            self._console.say(f"going on from step {start_step}{f', {lost} steps are lost' if lost else ''}")
        for name in progress.damaged_checkpoints:
            self._console.say(f"checkpoint {name} was damaged and is set aside")
        if progress.processes and progress.processes != self.processes:  # some were lost, and Ray went on with those that are left
            self._reporter.update(usage=self._usage())
            self._earlier_gpu_seconds, self._gpus_since = self._usage().gpu_seconds, time.monotonic()
            self._console.say(f"processes that take part: {progress.processes}, before {self.processes}")
            self.processes = progress.processes
        self._group, self._furthest, self.regroup = progress.group, start_step, False
        self._reporter.update(lost_steps=self._lost_steps)

    def _stage(self, name: str) -> str:
        return next(stage.state for stage in self._reporter.report.stages if stage.name == name)

    def _usage(self) -> Usage:
        seconds = time.monotonic() - self._gpus_since if self._gpus_since is not None else 0.0
        gpu_seconds = round(self._earlier_gpu_seconds + self._on_gpus * self.processes * seconds, 1)
        return Usage(gpu_seconds=gpu_seconds, trained_tokens=self._earlier_tokens + self._latest_tokens)
