"""examples/demo.py, with commands in place of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.unit.docs.markdown import ROOT

DEMO = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("demo", sys.argv[1])
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
demo.TUNE, demo.ASK = (sys.executable, sys.argv[2], "tune", "--fresh"), (sys.executable, sys.argv[2], "ask")
sys.exit(demo.main())
"""
COMMAND = """
import pathlib, signal, sys, time
def suspend(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, suspend)
print("this is", *sys.argv[1:], flush=True)
if sys.argv[1] == "tune" and pathlib.Path(__file__).with_name("slow").exists():
    pathlib.Path(__file__).with_name("runs").touch()
    time.sleep(60)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    (folder / "command.py").write_text(COMMAND)
    words = [sys.executable, "-c", DEMO, str(ROOT / "examples/demo.py"), str(folder / "command.py")]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_the_demo_tunes_and_asks(tmp_path: Path) -> None:
    demo = start(tmp_path)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, output
    assert [line for line in output.splitlines() if line.startswith("this is")] == ["this is tune --fresh", "this is ask"]


def test_ctrl_c_leaves_time_for_the_checkpoint_and_says_what_goes_on_from_it(tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    demo = start(tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "runs").exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(demo.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the whole group
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 128 + signal.SIGINT, output
    assert "saved" in output
    assert "Traceback" not in output
    assert "`make demo` always begins anew." in output
    assert output.rstrip().endswith(f"{tmp_path / 'command.py'} tune")
