"""What the Makefile does, as far as no network is needed."""

import subprocess
from pathlib import Path

from tests.unit.docs.markdown import EXAMPLES, ROOT


def test_clean_removes_what_runs_left_and_nothing_else(tmp_path: Path) -> None:
    """A local run keeps its state, and its job with the status, beside the manifest."""
    manifests = {tmp_path / path.relative_to(ROOT) for path in EXAMPLES}
    left = {path.parent / name for path in manifests for name in (f"{path.stem}.status.yaml", ".finetune/claims/out/adapter/README.md")}
    assert {path.parent.name for path in manifests} >= {"examples", "methods", "objectives"}
    for path in manifests | left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("kind: FineTuneJob")
    subprocess.run(["make", "-f", ROOT / "Makefile", "clean", "VENV=.venv"], cwd=tmp_path, check=True, capture_output=True)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == manifests
    assert not list(tmp_path.rglob(".finetune"))
