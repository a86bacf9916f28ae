"""The quickstart in one go: tune the small model of this repository, then ask it three questions before and after.

    python examples/demo.py              # what `make demo` runs

Everything it does are two commands that you can type yourself; it prints them.
"""

import shlex
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent
TUNE = (
    *(str(Path(sys.executable).with_name("finetune")), "local", str(EXAMPLES / "quickstart.yaml"), "--fresh"),
    *("--claim", f"quickstart/models={EXAMPLES / 'models'}", "--config-map", f"support-data={EXAMPLES / 'data' / 'support'}"),
)
ASK = (
    *(sys.executable, str(EXAMPLES / "ask.py"), "--base", str(EXAMPLES / "models" / "tiny-llama")),
    *("--adapter", str(EXAMPLES / ".finetune" / "claims" / "quickstart" / "out" / "adapter")),
)


def run(command: tuple[str, ...]) -> None:
    """Run a command that is shown first. Ends this program with its exit code where it fails."""
    print(f"\n$ {shlex.join(command)}\n", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        sys.exit(code)


if __name__ == "__main__":
    run(TUNE)
    run(ASK)
