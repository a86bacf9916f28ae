"""Runs of the command with a trainer that only looks like one (`fake_trainer.py`)."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from finetune_operator.local.processes import MARK

HERE = Path(__file__).parent
COMMAND = """
import sys
from pathlib import Path
from finetune_operator.local import run
from finetune_operator.local.cluster import Machine

path, *words = sys.argv[1:]
fake = [sys.executable, {fake!r}]
machine = Machine(programs={{role: [*fake, role] for role in ("head", "worker")}})
options = run.Options(
    fresh="--fresh" in words, logs="--logs" in words, timeout=1.0 if "--timeout" in words else None, measure="--measure" in words
)
sys.exit(run.run_local(Path(path), options, machine=machine))
"""

JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: demo}
spec:
  model: {source: pvc://disk/model}
  data:
    train: {configMap: {name: rows, key: train.jsonl}}
  method: {lora: {}}
  backoffLimit: 1
  output: {storage: pvc://disk/out}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: rows}
data: {train.jsonl: "{}"}
"""


@dataclass
class Place:
    """A folder with a manifest, and the command run on it."""

    folder: Path
    mode: str = "complete"

    @property
    def manifest(self) -> Path:
        return self.folder / "job.yaml"

    @property
    def traces(self) -> Path:
        return self.folder / "traces"

    def stored(self) -> dict:
        return yaml.safe_load((self.folder / "demo.status.yaml").read_text())

    def start(self, *words: str) -> subprocess.Popen:
        roots = os.pathsep.join(str(Path(root).resolve()) for root in sys.path if root)
        env = {**os.environ, "PYTHONPATH": roots, "FAKE_FOLDER": str(self.traces), "FAKE_MODE": self.mode}
        command = [sys.executable, "-c", COMMAND.format(fake=str(HERE / "fake_trainer.py")), str(self.manifest), *words]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def run(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=100)
        finally:
            process.kill()
        return process.returncode, output

    def wait_for(self, trace: str) -> None:
        """Wait until the fake trainer has left a trace."""
        self.eventually((self.traces / trace).exists)

    def eventually(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        """Wait until a condition holds. Raises AssertionError after that time."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s"
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """Everything of this folder's pods that still runs."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if MARK in environment and environment.get("FAKE_FOLDER") == str(self.traces) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def place(tmp_path):
    """A place of a name that shells, URLs and formats would trip over."""
    folder = tmp_path / "my job ü%s {0} 'x'"
    (folder / "traces").mkdir(parents=True)
    (folder / ".finetune" / "claims" / "disk" / "model").mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB)
    found = Place(folder)
    yield found
    for process in found.processes():
        process.kill()
