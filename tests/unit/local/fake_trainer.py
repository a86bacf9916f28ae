"""A trainer's outside without its inside: the report, the termination message, the exit codes; no model.

Run as `fake_trainer.py head|worker`. FAKE_FOLDER is where it leaves its traces, FAKE_MODE what it does:

    complete     prepare, ask for the workers, wait for them, publish
    interrupt    as complete, but the first attempt waits for SIGTERM while it trains, and leaves a checkpoint
    degraded     as complete; measured again, the model is worse than when it was released
    fail         fail in Prepare with a row at fault
    stubborn     train for ever and do not listen to SIGTERM
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from finetune_api.monitoring_status import FreshFigure
from finetune_api.report import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SUCCEEDED, Report
from finetune_api.status import (
    STAGES,
    Artifact,
    CheckpointRef,
    Checkpoints,
    Evaluation,
    EvaluationResult,
    Failure,
    Metric,
    Progress,
    Stage,
)

FOLDER = Path(os.environ["FAKE_FOLDER"])
MODE = os.environ["FAKE_MODE"]
TOTAL_STEPS = 10


def main() -> int:
    (FOLDER / f"{sys.argv[1]}-{os.environ['FINETUNE_ATTEMPT']}").write_text(json.dumps(dict(os.environ)))
    # What a pod leaves behind when only its first process is killed: a child in a session of its own.
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    if sys.argv[1] == "worker":
        signal.pause()
    return Head().run()


class Head:
    def __init__(self) -> None:
        self.job = json.loads(Path(os.environ["FINETUNE_JOB_FILE"]).read_text())
        self.attempt = int(os.environ["FINETUNE_ATTEMPT"])
        self.report = Report(job_uid=self.job["metadata"]["uid"], attempt=self.attempt)
        self.stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: None if MODE == "stubborn" else self.stop.set())
        threading.Thread(target=serve, args=(self,), daemon=True).start()

    def say(self, **changes: object) -> None:
        self.report = self.report.model_copy(update={"revision": self.report.revision + 1, **changes})

    def run(self) -> int:
        print("preparing", flush=True)
        self.say(stages=stages(0), message="reading the data")
        if self.job["spec"].get("monitoring"):
            value = 0.3 if MODE == "degraded" else 0.8
            fresh = FreshFigure(metric="task/f1", value=value, low=value - 0.1, high=value + 0.1, n=20)
            return self.end("Succeeded", EXIT_SUCCEEDED, fresh=(fresh,))
        if MODE == "fail":
            print("row 7 is broken", flush=True)
            why = Failure(stage="Prepare", reason="DatasetInvalid", message="train.jsonl line 7: no completion", hint="Correct the row.")
            return self.end("Failed", EXIT_FAILED, failure=why)
        checkpoint = FOLDER / "checkpoint"
        resumed = int(checkpoint.read_text()) if checkpoint.exists() else None
        workers = self.job["spec"]["compute"]["workers"]["max"]
        self.say(warnings=("the data is small",))
        self.say(stages=stages(1), workers_wanted=workers, resumed_step=resumed, progress=progress(resumed or 0), message="training")
        wait_for(FOLDER / f"worker-{self.attempt}")
        if MODE == "stubborn" or (MODE == "interrupt" and self.attempt == 1):
            while not self.stop.wait(0.05):
                pass
            checkpoint.write_text("4")
            return self.end(
                "Interrupted", EXIT_INTERRUPTED, progress=progress(4), checkpoints=Checkpoints(latest=CheckpointRef(step=4, uri="x"))
            )
        loss = (Metric(name="train/loss", value=0.25, step=TOTAL_STEPS),)
        self.say(stages=stages(2), workers_wanted=0, progress=progress(TOTAL_STEPS), metrics=loss)
        self.say(stages=stages(3))
        results = (EvaluationResult(metric="test/loss", value=0.3, baseline=3.1),)
        if self.job["spec"]["evaluation"]["suites"]:
            results += (EvaluationResult(metric="task/f1", value=0.75, baseline=0.5),)
        where = f"{self.job['spec']['output']['storage']}/adapter"
        artifact = Artifact(kind="adapter", uri=where, digest="sha256:00", bytes=1_500_000)
        return self.end("Succeeded", EXIT_SUCCEEDED, stages=stages(4), evaluation=Evaluation(results=results), artifacts=(artifact,))

    def end(self, outcome: str, code: int, **changes: object) -> int:
        self.say(outcome=outcome, workers_wanted=0, **changes)
        Path(os.environ["FINETUNE_TERMINATION_LOG"]).write_text(json.dumps(self.report.to_json()))
        return code


def serve(head: Head) -> None:
    token = Path(os.environ["FINETUNE_TOKEN_FILE"]).read_text()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers.get("Authorization") == f"Bearer {token}"
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(json.dumps(head.report.to_json()).encode() if allowed else b"")

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", int(os.environ["FINETUNE_REPORT_PORT"])), Handler).serve_forever()


def stages(done: int) -> tuple[Stage, ...]:
    state = ["Succeeded"] * done + ["Running"] * (done < 4) + ["Pending"] * (3 - done)
    return tuple(Stage(name=name, state=state[index]) for index, name in enumerate(STAGES))


def progress(step: int) -> Progress:
    return Progress(percent=100 * step // TOTAL_STEPS, step=step, total_steps=TOTAL_STEPS, epoch=step / TOTAL_STEPS)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
