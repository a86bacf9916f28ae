"""The closed loop in pods: documents and golden replies become a gated adapter; with a gate that cannot be passed nothing is published."""

import copy
import json
from typing import Any

import pytest
from tests.e2e.kubectl import Kubectl, assert_all_gone
from tests.e2e.names import CLAIM, ROOT
from tests.e2e.test_whole_way import condition, status_of

from finetune_operator.manifest import read_manifests

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

EXAMPLE = ROOT / "examples/closed-loop.yaml"
DATA = ROOT / "examples/data/closed-loop"


@pytest.fixture(scope="module")
def example(kubectl: Kubectl, writer: str) -> dict[str, Any]:
    """The manifest, with the writer's place in this cluster."""
    kubectl("create", "configmap", "closed-loop", f"--from-file={DATA}")
    (found,) = copy.deepcopy(read_manifests(EXAMPLE.read_text()))
    found["spec"]["data"]["preparation"]["contentPoints"]["generator"]["endpoint"]["url"] = writer
    return dict(found)


def test_documents_become_a_gated_adapter(release: Kubectl, kubectl: Kubectl, storage: str, example: dict[str, Any]) -> None:
    name = example["metadata"]["name"]
    kubectl.apply(example)
    kubectl("wait", f"finetunejob/{name}", "--for=condition=Complete", "--timeout=780s", timeout=800)
    status = status_of(kubectl, name)
    assert status["attempt"]["number"] == 1
    assert [stage["name"] for stage in status["stages"]] == ["Prepare", "Baseline", "Train", "Evaluate", "Publish"]
    assert status["data"]["made"] == 330
    assert [gate["verdict"] for gate in status["evaluation"]["gates"]] == ["Passed"] * 4
    assert condition(status, "GatesPassed")["status"] == "True"
    row = kubectl("get", "ftj", name).strip().splitlines()[1]
    assert row.split()[1] == "Complete"
    made = json.loads(kubectl.python(storage, _MADE, "/storage/closed-loop", name))
    assert made == {"adapter": True, "report": True, "pictures": 3}
    kubectl("delete", "ftj", name)
    assert_all_gone(kubectl, name, 60)


_MADE = """
import json, sys
from pathlib import Path

out, name = Path(sys.argv[1]), sys.argv[2]
(report,) = (out / "report").glob(f"*/{name}/report.md")
print(json.dumps({
    "adapter": (out / "adapter" / "adapter_model.safetensors").exists(),
    "report": "all gates passed" in report.read_text(),
    "pictures": len(list(report.parent.glob("*.svg"))),
}))
"""


@pytest.mark.long
def test_a_gate_that_is_not_passed_publishes_nothing(release: Kubectl, kubectl: Kubectl, storage: str, example: dict[str, Any]) -> None:
    """Trained too little to be any good."""
    job = copy.deepcopy(example)
    job["metadata"]["name"] = "held"
    spec = job["spec"]
    spec["training"] |= {"epochs": 1, "learningRate": 1e-6}
    spec["evaluation"] |= {"onGateFailure": "hold", "gates": [{"metric": "replies/rougeL", "minImprovement": 0.2, "over": "baseline"}]}
    spec["output"]["storage"] = f"pvc://{CLAIM}/held"
    del spec["baseline"]
    kubectl.apply(job)
    kubectl("wait", "finetunejob/held", "--for=condition=Failed", "--timeout=480s", timeout=500)
    status = status_of(kubectl, "held")
    assert status["failure"]["reason"] == "GatesNotPassed"
    assert [gate["verdict"] for gate in status["evaluation"]["gates"]] == ["Failed"]
    assert condition(status, "Published").get("status") != "True"
    assert not status.get("artifacts")
    held = kubectl.python(storage, "import sys, pathlib; print(*pathlib.Path('/storage/held').rglob('adapter_model.safetensors'))").split()
    assert len(held) == 1
    assert "/.finetune/" in held[0]
    kubectl("delete", "ftj", "held")
    assert_all_gone(kubectl, "held", 60)
