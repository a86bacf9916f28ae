"""The example of the whole loop as a user runs it: from a manual and golden replies to a published adapter, with the proof."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDED = ("closed-loop.yaml", "closed_loop.py", "extractive_writer.py", "data/closed-loop", "models/tiny-llama")


@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_the_closed_loop_ends_in_a_gated_adapter_with_its_report(tmp_path: Path) -> None:
    for name in NEEDED:
        source, target = EXAMPLES / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    done = subprocess.run([sys.executable, str(tmp_path / "closed_loop.py")], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    status = yaml.safe_load((tmp_path / "closed-loop.status.yaml").read_text())["status"]
    assert status["phase"] == "Complete"
    assert [stage["name"] for stage in status["stages"]] == ["Prepare", "Baseline", "Train", "Evaluate", "Publish"]
    assert {stage["state"] for stage in status["stages"]} == {"Succeeded"}
    assert status["data"]["made"] == 330  # a golden reply each
    assert {entry["prompt"] for entry in status["baseline"]} == {"zero-shot", "few-shot", "rag"}
    assert [gate["verdict"] for gate in status["evaluation"]["gates"]] == ["Passed"] * 4
    results = {result["metric"]: result for result in status["evaluation"]["results"]}
    better = results["replies/rougeL"]
    assert better["low"] > better["baseline"] + 0.2
    assert results["small-talk/loss"]["value"] > results["small-talk/loss"]["baseline"]  # so small a model cannot keep both
    assert status["artifacts"][0]["kind"] == "adapter"

    storage = tmp_path / ".finetune" / "claims" / "quickstart" / "closed-loop"
    assert (storage / "adapter" / "adapter_model.safetensors").exists()
    report = storage / "report" / "default" / "closed-loop"
    text = (report / "report.md").read_text()
    for words in ("all gates passed", "| **Passed** | `replies/rougeL`", "## Samples", "few-shot", "loss.svg"):
        assert words in text
    assert {"loss.svg", "metrics-1.svg", "prompts.svg"} <= {path.name for path in report.iterdir()}
