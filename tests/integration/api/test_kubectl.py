"""What a person sees through kubectl, on whatever API server there is: also one that is too old for the CRD's CEL rules."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.integration.api.apiserver import ApiServer
from tests.integration.api.stages import Stage

pytestmark = pytest.mark.api

ROOT = Path(__file__).parents[3]
STATUS = {
    "phase": "Training",
    "message": "step 420 of 1260",
    "attempt": {"number": 2},
    "progress": {"percent": 33},
    "metrics": [{"name": "validation/loss", "value": 1.31}, {"name": "train/loss", "value": 1.18}],
    "conditions": [
        {
            "type": "GatesPassed",
            "status": "Unknown",
            "observedGeneration": 1,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "reason": "Pending",
        }
    ],
}


@pytest.fixture
def kubectl(stage: Stage, server: ApiServer, tmp_path: Path):
    """Runs kubectl in the test's namespace and gives what it printed."""
    found = shutil.which("kubectl", path=f"{os.environ.get('KUBEBUILDER_ASSETS', '')}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip("kubectl is neither on PATH nor in KUBEBUILDER_ASSETS")
    config = ["--kubeconfig", str(server.admin_kubeconfig), "--namespace", stage.namespace, "--cache-dir", str(tmp_path / "cache")]

    def run(*arguments: str) -> str:
        done = subprocess.run([found, *config, *arguments], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def _table(text: str) -> list[list[str]]:
    return [line.split(maxsplit=5) for line in text.splitlines()]


def test_the_quickstart_is_applied_and_its_columns_follow_its_status(kubectl):
    applied = kubectl("apply", "-f", str(ROOT / "examples/quickstart.yaml")).splitlines()
    (job,) = [line.split("/")[1].removesuffix(" created") for line in applied if line.startswith("finetunejob.finetune.dev/")]
    stored = json.loads(kubectl("get", "ftj", job, "-o", "json"))
    assert stored["status"] == {"observedGeneration": -1}
    assert stored["spec"]["training"]["seed"] is not None
    kubectl("patch", "ftj", job, "--subresource=status", "--type=merge", "-p", json.dumps({"status": STATUS}))
    head, row = _table(kubectl("get", "ftj"))
    assert [*head, *row] == ["NAME", "PHASE", "PROGRESS", "LOSS", "GATES", "AGE", job, "Training", "33", "1.18", "Unknown", row[-1]]
    wide = kubectl("get", "ftj", "-o", "wide")
    assert "ATTEMPT" in wide
    assert "step 420 of 1260" in wide
    assert f"finetunejob.finetune.dev/{job}" in kubectl("get", "all")
    # Applied again, nothing changes; deleted, nothing holds it.
    assert f"finetunejob.finetune.dev/{job} unchanged" in kubectl("apply", "-f", str(ROOT / "examples/quickstart.yaml"))
    kubectl("delete", "ftj", job, "--timeout=20s")


def test_explain_gives_the_docstrings(kubectl):
    text = " ".join(kubectl("explain", "ftj.spec.training.warmupRatio").split())
    assert "Share of the steps in which the learning rate rises from zero." in text
