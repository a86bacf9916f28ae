"""A small job with all three splits and a suite of its own, for tests of the whole loop that change what it leaves behind."""

import json
from pathlib import Path

from tests.tiny_llama import make_tiny_llama, write_questions


def make_inputs(volumes: Path) -> Path:
    """The claims of the job called job: its model and data, and an empty one for its output. Returns `volumes`."""
    claim = volumes / "claims" / "data"
    make_tiny_llama(claim / "model")
    for name, count, start in (("train", 48, 0), ("validation", 12, 100), ("test", 8, 200)):
        write_questions(claim / f"{name}.jsonl", count, start=start)
    (claim / "other.jsonl").write_text("".join(json.dumps({"text": f"{number} and {number} again"}) + "\n" for number in range(8)))
    (volumes / "claims" / "job").mkdir()
    return volumes


def own_folder(inputs: Path) -> Path:
    """Where the job keeps its checkpoints and reports."""
    return inputs / "claims" / "job" / "out" / ".finetune" / "job"
