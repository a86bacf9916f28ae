"""The quickstart in one go: tune the small model of this repository, then ask it three questions before and after.

    python examples/demo.py              # what `make demo` runs

Everything it does are two commands that you can type yourself; it prints them.
"""

import shlex
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent
INTERRUPTED = 130
"""Exit code of `finetune local` after Ctrl-C."""
TUNE = (
    *(str(Path(sys.executable).with_name("finetune")), "local", str(EXAMPLES / "quickstart.yaml"), "--fresh"),
    *("--claim", f"quickstart/models={EXAMPLES / 'models'}", "--config-map", f"support-data={EXAMPLES / 'data' / 'support'}"),
)
ASK = (
    *(sys.executable, str(EXAMPLES / "ask.py"), "--base", str(EXAMPLES / "models" / "tiny-llama")),
    *("--adapter", str(EXAMPLES / ".finetune" / "claims" / "quickstart" / "out" / "adapter")),
)


def run(command: tuple[str, ...]) -> int:
    """Run a command that is shown first, to its own end also after Ctrl-C. Returns its exit code."""
    print(f"\n$ {shlex.join(command)}\n", flush=True)
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it is the other process's too, which saves a checkpoint first
            continue


def main() -> int:
    """The whole demo. Returns the exit code of the command that ended it."""
    code = run(TUNE)
    if code == INTERRUPTED:
        goes_on = shlex.join(word for word in TUNE if word != "--fresh")
        print(f"\n`make demo` always begins anew. This goes on from the checkpoint:\n\n$ {goes_on}\n", flush=True)
    return code or run(ASK)


if __name__ == "__main__":
    sys.exit(main())
