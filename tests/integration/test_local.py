"""`finetune local` with the real trainer and Ray: the quickstart's way, cut short, interrupted, killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from finetune_operator.local.processes import MARK

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMAND = [sys.executable, "-c", "from finetune_operator.cli import main; main()", "local"]


@dataclass
class Quickstart:
    """The quickstart in a folder of its own, with fewer epochs."""

    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "quickstart.yaml"

    @property
    def out(self) -> Path:
        return self.folder / ".finetune" / "claims" / "quickstart" / "out"

    def set_up(self, *, epochs: int) -> None:
        text = (EXAMPLES / "quickstart.yaml").read_text()
        text, changes = re.subn(r"epochs: \d+", f"epochs: {epochs}", text)
        assert changes == 1
        text, changes = re.subn(r"everySteps: \d+", "everySteps: 5", text)
        assert changes == 1
        self.manifest.write_text(text)
        shutil.copytree(EXAMPLES / "data" / "support", self.folder / "support")

    def start(self) -> subprocess.Popen[str]:
        roots = os.pathsep.join(str(Path(root).resolve()) for root in sys.path if root)
        given = ["--claim", f"quickstart/models={EXAMPLES / 'models'}", "--config-map", f"support-data={self.folder / 'support'}"]
        env = {**os.environ, "PYTHONPATH": roots, "LOCAL_TEST": str(self.folder)}
        return subprocess.Popen(
            [*COMMAND, str(self.manifest), *given],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self) -> tuple[int, str]:
        process = self.start()
        try:
            output, _ = process.communicate(timeout=1400)
        finally:
            process.kill()
        return process.returncode, output

    def status(self) -> dict[str, Any]:
        try:
            return dict(yaml.safe_load((self.folder / "quickstart.status.yaml").read_text()).get("status") or {})
        except FileNotFoundError:
            return {}

    def eventually(self, condition: Callable[[], object], run: subprocess.Popen[str]) -> None:
        """Wait until a condition holds, as long as the command runs."""
        while not condition():
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """What still runs of this folder's pods. A Ray process may have overwritten its environment: its parents have not."""
        found = {}
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if MARK in environment and environment.get("LOCAL_TEST") == str(self.folder):
                    found |= {each.pid: each for each in (process, *process.children(recursive=True))}
            except psutil.Error:
                continue
        return [process for process in found.values() if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def checkpoints(self) -> list[str]:
        return sorted(path.parent.name for path in self.out.glob(".finetune/*/checkpoints/*/manifest.json"))


@pytest.fixture
def quickstart(tmp_path: Path) -> Iterator[Quickstart]:
    folder = tmp_path / "my job ü (1)"
    folder.mkdir()
    found = Quickstart(folder)
    yield found
    for process in found.processes():
        process.kill()


def figures(status: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {result["metric"]: (result["baseline"], result["value"]) for result in status["evaluation"]["results"]}


def test_a_killed_run_goes_on_from_its_checkpoint_and_leaves_nothing(quickstart: Quickstart) -> None:
    quickstart.set_up(epochs=2)
    run = quickstart.start()
    quickstart.eventually(quickstart.checkpoints, run)
    before = quickstart.processes()
    run.kill()
    run.communicate()
    assert any("raylet" in " ".join(process.cmdline()) for process in before)

    code, output = quickstart.run()
    assert code == 0, output
    assert "ended what an earlier run had left: quickstart-1-head" in output
    assert not [process for process in before if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert quickstart.processes() == []

    status = quickstart.status()
    conditions = {condition["type"]: condition["status"] for condition in status["conditions"]}
    assert {name: conditions[name] for name in ("Accepted", "DataReady", "Trained", "Evaluated", "Published", "Complete")} == dict.fromkeys(
        ("Accepted", "DataReady", "Trained", "Evaluated", "Published", "Complete"), "True"
    )
    assert (status["attempt"]["number"], status["attempt"]["failures"], status["attempt"]["preemptions"]) == (2, 0, 1)
    assert status["progress"]["step"] == status["progress"]["totalSteps"]
    loss_before, loss_after = figures(status)["test/loss"]
    assert loss_after < loss_before / 2
    adapter = json.loads((quickstart.out / "adapter" / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["r"]) == ("LORA", 16)
    assert str(quickstart.out / "adapter") in output


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on(quickstart: Quickstart) -> None:
    quickstart.set_up(epochs=2)
    run = quickstart.start()
    quickstart.eventually(lambda: quickstart.status().get("progress", {}).get("step", 0) >= 1, run)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=900)
    assert run.returncode == 130, output
    assert quickstart.status()["phase"] == "Suspended"
    assert quickstart.processes() == []
    saved = quickstart.checkpoints()
    assert saved, output

    code, output = quickstart.run()
    assert code == 0, output
    attempt = quickstart.status()["attempt"]
    assert (attempt["number"], attempt["failures"], attempt["preemptions"], attempt["lostSteps"]) == (2, 0, 0, 0)


def test_a_broken_row_ends_the_job_before_a_worker_starts(quickstart: Quickstart) -> None:
    quickstart.set_up(epochs=1)
    train = quickstart.folder / "support" / "train.jsonl"
    lines = train.read_text().splitlines()
    lines[6] = lines[6][:-5]
    train.write_text("\n".join(lines))
    code, output = quickstart.run()
    assert code == 1, output
    assert "quickstart failed in Prepare: DatasetInvalid" in output
    assert "train.jsonl" in output
    assert re.search(r"line 7\b", output), output
    assert "Hint: " in output
    assert [path.name for path in (quickstart.folder / ".finetune" / "logs").iterdir()] == ["quickstart-1-head.log"]
    assert quickstart.status()["failure"]["reason"] == "DatasetInvalid"
    assert quickstart.processes() == []
