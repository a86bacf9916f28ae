"""The head's process: its server, its Ray, its signals, and how it ends."""

import os
import shutil
import signal
import threading
import traceback
from pathlib import Path
from types import FrameType

from finetune_api.report import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SUCCEEDED, Outcome, Report, termination_message
from finetune_api.status import Failure, StageName
from finetune_trainer.console import Console
from finetune_trainer.environment import Environment, scratch_folder
from finetune_trainer.failures import failure_from, scrub
from finetune_trainer.following import Following
from finetune_trainer.ray_cluster import RayHead
from finetune_trainer.report import Reporter, ReportServer
from finetune_trainer.run import Attempt, InterruptedRunError, run_stages

EXIT_CODES: dict[Outcome, int] = {"Succeeded": EXIT_SUCCEEDED, "Failed": EXIT_FAILED, "Interrupted": EXIT_INTERRUPTED}


def run_head(environment: Environment) -> int:
    """Run one attempt to its end. Returns the exit code; report, storage and termination log say how it ended."""
    console = Console()
    try:
        job = environment.job()
    except Exception as error:
        report = Report(job_uid="", attempt=environment.attempt, outcome="Failed", failure=failure_from(error, "Prepare"))
        return _end(environment, report, console)

    scratch = scratch_folder(job.metadata.uid, environment.attempt)
    reporter = Reporter(job.metadata.uid, environment.attempt)
    stop = threading.Event()
    following = Following(reporter, console, stop)
    # Ray starts while the data is checked; it is the first child, before there are threads.
    ray_head = RayHead(environment, scratch)
    attempt = Attempt(environment, job, reporter, console, ray_head, following, stop)
    server = ReportServer(reporter, environment.token(), environment.report_port, following.take)
    try:
        server.start()
        listen_for_stop(attempt)
        console.say(f"job {job.metadata.namespace}/{job.metadata.name}, attempt {environment.attempt}")
        run_stages(attempt)
        reporter.finish("Succeeded", "the result is published")
    except (InterruptedRunError, KeyboardInterrupt):
        reporter.finish("Interrupted", "stopped; the next attempt goes on from the last checkpoint")
    except Exception as error:
        failure = failure_from(error, running_stage(reporter.report))
        if failure.reason == "InternalError":
            console.say(scrub("".join(traceback.format_exception(error))))
        reporter.finish("Failed", failure.message, failure)
    finally:
        ignore_stop()
        keep(attempt)
        ray_head.stop()
        console.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return _end(environment, reporter.report, console)


def listen_for_stop(attempt: Attempt) -> None:
    """Hear SIGTERM and Ctrl-C: where there is nothing to save the attempt ends at once, while workers train it first has them save."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        attempt.stop.set()
        if running_stage(attempt.reporter.report) == "Prepare":
            raise InterruptedRunError

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


def ignore_stop() -> None:
    """From now on the attempt ends anyway."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def running_stage(report: Report) -> StageName | None:
    """The stage that runs."""
    return next((stage.name for stage in report.stages if stage.state == "Running"), None)


def keep(attempt: Attempt) -> None:
    """Leave the report in the storage. Where that fails, the termination message still says how it ended."""
    try:
        attempt.keep_report()
    except Exception as error:
        attempt.console.say(f"the report could not be kept in the storage: {scrub(str(error))}")


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
