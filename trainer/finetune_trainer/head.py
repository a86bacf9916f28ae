"""The head's process: its server, its Ray, its signals, and how it ends."""

import os
import shutil
import time
import traceback
from pathlib import Path

from finetune_api.report import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SUCCEEDED, Outcome, Report, termination_message
from finetune_api.scrub import last_lines, scrub
from finetune_api.status import LOG_MAX, Failure, StageName
from finetune_api.v1alpha1 import stages_of
from finetune_trainer.attempt import Attempt
from finetune_trainer.console import Console
from finetune_trainer.environment import Environment, scratch_folder
from finetune_trainer.failures import failure_from
from finetune_trainer.following import Following
from finetune_trainer.interruption import InterruptedRunError, Interruption
from finetune_trainer.ray_cluster import RayHead, ray_variables
from finetune_trainer.report import Reporter, ReportServer
from finetune_trainer.run import run_stages

EXIT_CODES: dict[Outcome, int] = {"Succeeded": EXIT_SUCCEEDED, "Failed": EXIT_FAILED, "Interrupted": EXIT_INTERRUPTED}
LINGER_SECONDS = 5.0
"""How long the head waits for its last report to be read, which the operator does every two seconds where no training runs."""
ENOUGH = "a prompt alone reaches baseline.sufficientIf: nothing was trained or published"


def run_head(environment: Environment) -> int:
    """Run one attempt to its end. Returns the exit code; report, storage and termination log say how it ended."""
    console = Console()
    try:
        job = environment.job()
    except Exception as error:
        report = Report(job_uid="", attempt=environment.attempt, outcome="Failed", failure=failure_from(error, "Prepare"))
        return _end(environment, report, console)

    for earlier in range(1, environment.attempt):  # what a killed head of this machine could not remove
        remove(scratch_folder(job.metadata.uid, earlier), seconds=0)
    scratch = scratch_folder(job.metadata.uid, environment.attempt)
    reporter = Reporter(job.metadata.uid, environment.attempt, stages=stages_of(job.spec))
    interruption = Interruption()
    following = Following(reporter, console, interruption)
    os.environ.update(ray_variables(environment))
    # Ray starts while the data is checked; it is the first child, before there are threads.
    ray_head = RayHead(environment, scratch)
    attempt = Attempt(environment, job, reporter, console, ray_head, following, interruption)
    server: ReportServer | None = None
    try:
        interruption.listen()
        server = ReportServer(reporter, environment.token(), environment.report_port, following.take)
        server.start()
        console.say(f"job {job.metadata.namespace}/{job.metadata.name}, attempt {environment.attempt}")
        run_stages(attempt)
        interruption.ignore()
        reporter.finish("Succeeded", ended_well(reporter.report))
    except InterruptedRunError:
        reporter.finish("Interrupted", "stopped; the next attempt goes on from the last checkpoint")
    except Exception as error:
        failure = failure_from(error, running_stage(reporter.report))
        if failure.reason == "InternalError":
            console.say(scrub("".join(traceback.format_exception(error))))
        failure = failure.model_copy(update={"log": last_lines(console.tail, LOG_MAX) or None})
        reporter.finish("Failed", failure.message, failure)
    interruption.ignore()
    attempt.keep_report()
    console.close()
    code = _end(environment, reporter.report, console)
    ray_head.stop()
    remove(scratch, seconds=5.0)
    if server and not interruption.requested:  # else the pod is on the clock
        server.wait_read(LINGER_SECONDS)
    return code


def ended_well(report: Report) -> str:
    """How a run that succeeded did."""
    if report.fresh:
        return f"{len(report.fresh)} metrics are measured on fresh data"
    if report.plan is not None:
        return report.message
    return ENOUGH if report.sufficient else "the result is published"


def remove(folder: Path, *, seconds: float) -> None:
    """Remove a folder; processes that are about to end may go on writing there for a moment."""
    deadline = time.monotonic() + seconds
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.05)


def running_stage(report: Report) -> StageName | None:
    """The stage that runs."""
    return next((stage.name for stage in report.stages if stage.state == "Running"), None)


def _end(environment: Environment, report: Report, console: Console) -> int:
    """Say how it ended, to the kubelet and to people."""
    if environment.termination_log is not None:
        write_termination_log(environment.termination_log, report)
    assert report.outcome is not None  # noqa: S101 - every way here sets it
    console.say(f"{report.outcome}{_why(report.failure)}")
    return EXIT_CODES[report.outcome]


def write_termination_log(path: Path, report: Report) -> None:
    """Write the message that the kubelet keeps with the container's state: in place, since it is a mount of one file."""
    with path.open("w", encoding="utf-8") as file:
        file.write(termination_message(report))
        file.flush()
        os.fsync(file.fileno())


def _why(failure: Failure | None) -> str:
    return f": {failure.reason}: {failure.message}\n{failure.hint or ''}".rstrip() if failure else ""
