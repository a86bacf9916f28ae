"""promtool, as Debian's package prometheus has it."""

import shutil
import subprocess
from pathlib import Path


def tool(name: str) -> str:
    """Path of prometheus or promtool. A machine without them cannot tell whether rules and dashboards are right: that is a failure."""
    found = shutil.which(name)
    assert found, f"{name} is not installed: apt-get install prometheus (nothing has to run), or unpack a release of Prometheus into PATH"
    return found


def check_metrics(text: bytes) -> str:
    """What promtool has to say against an exposition; empty where it is as the conventions have it."""
    ended = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True, check=False, timeout=60)
    return (ended.stdout + ended.stderr).decode() + (f"exit code {ended.returncode}" if ended.returncode else "")


def promtool(*arguments: str, folder: Path) -> str:
    """What promtool prints in this folder. Fails with that where it does not succeed."""
    ended = subprocess.run([tool("promtool"), *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
