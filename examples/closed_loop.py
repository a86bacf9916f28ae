"""The closed loop in one go: from a manual and golden replies to a model that passed its gates, with its report.

    python examples/closed_loop.py

It starts the writer of content points (extractive_writer.py) and runs the job on this machine; the command is printed.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from extractive_writer import served

EXAMPLES = Path(__file__).parent
PORT = 8099
"""As closed-loop.yaml has it."""
RUN = (
    *(str(Path(sys.executable).with_name("finetune")), "local", str(EXAMPLES / "closed-loop.yaml"), "--fresh"),
    *("--claim", f"quickstart/models={EXAMPLES / 'models'}", "--config-map", f"closed-loop={EXAMPLES / 'data' / 'closed-loop'}"),
)
REPORT = EXAMPLES / ".finetune" / "claims" / "quickstart" / "closed-loop" / "report" / "default" / "closed-loop" / "report.md"

if __name__ == "__main__":
    try:
        served(PORT)
    except OSError as error:
        sys.exit(f"port {PORT} of this machine is needed for the writer of content points: {error.strerror}")
    print(f"\n$ {shlex.join(RUN)}\n", flush=True)
    code = subprocess.run(RUN, check=False).returncode
    print(f"\nThe report, with pictures beside it: {REPORT}" if REPORT.exists() else "")
    sys.exit(code)
