"""Objectives that need more than the data, in pods: a teacher on a volume, with the student shared out; and one behind an endpoint."""

import json

import pytest
from tests.e2e import teacher
from tests.e2e.kubectl import Kubectl, assert_all_gone
from tests.e2e.names import CLAIM
from tests.e2e.test_whole_way import job, pods_of, status_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

TRAINING = {"epochs": 4, "globalBatchSize": 8, "maxSequenceLength": 128}


@pytest.mark.long
def test_sharded_student_learns_from_what_is_kept_of_a_teacher(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    name = "distilled"
    spec = {
        "method": {"full": {}},
        "objective": {
            "distillation": {"teacher": {"source": f"pvc://{CLAIM}/models/tiny-llama"}, "labelWeight": 1, "response": {"topK": 8}}
        },
        "training": TRAINING,
        "compute": {"workers": {"min": 2, "max": 2}, "strategy": "fsdp"},
    }
    kubectl.apply(job(name, **spec))
    kubectl("wait", f"finetunejob/{name}", "--for=condition=Complete", "--timeout=420s", timeout=440)

    status = status_of(kubectl, name)
    assert status["attempt"]["number"] == 1
    assert status["model"]["trainedParameters"] == status["model"]["parameters"]
    assert any("method.full" in warning for warning in status["warnings"])
    assert "Warned" in {event["reason"] for event in kubectl.get("events")["items"] if event["involvedObject"]["name"] == name}
    assert [artifact["kind"] for artifact in status["artifacts"]] == ["model"]
    made = json.loads(kubectl.python(storage, _MADE, f"/storage/out-{name}"))
    assert made["shards"] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert made["kept"] > 0
    assert made["words"] > 0
    kubectl("delete", "ftj", name)
    assert_all_gone(kubectl, name, 60)


_MADE = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer

out = Path(sys.argv[1])
newest = max((out / ".finetune").glob("*/checkpoints/step-*"))
(published,) = out.glob("model")
model, tokenizer = AutoModelForCausalLM.from_pretrained(published), AutoTokenizer.from_pretrained(published)
made = model.generate(**tokenizer("I get error code", return_tensors="pt"), max_new_tokens=5, do_sample=False)
print(json.dumps({
    "shards": sorted(path.name for path in newest.glob("model-*")),
    "kept": sum(path.stat().st_size for path in (out / ".finetune/cache/teacher").rglob("*.npy")),
    "words": made.shape[1],
}))
"""


def test_endpoint_that_refuses_the_key_costs_no_worker(release: Kubectl, kubectl: Kubectl, storage: str, endpoint: None) -> None:
    name = "refused"
    kubectl.apply(
        teacher.secret("wrong-key", "another-key"),
        job(name, objective=teacher.job_spec(kubectl.namespace, "wrong-key"), backoffLimit=0),
    )
    kubectl("wait", f"finetunejob/{name}", "--for=condition=Failed", "--timeout=180s", timeout=200)
    failure = status_of(kubectl, name)["failure"]
    assert (failure["stage"], failure["reason"]) == ("Prepare", "AuthenticationFailed")
    assert "401" in failure["message"]
    assert pods_of(kubectl, name, "worker") == []
    kubectl("delete", "ftj", name)
    assert_all_gone(kubectl, name, 60)


def test_student_learns_the_answers_of_an_endpoint(release: Kubectl, kubectl: Kubectl, storage: str, endpoint: None) -> None:
    name = "served"
    kubectl.apply(
        teacher.secret("right-key", teacher.KEY),
        job(name, objective=teacher.job_spec(kubectl.namespace, "right-key"), training=TRAINING | {"learningRate": 8e-3}),
    )
    kubectl("wait", f"finetunejob/{name}", "--for=condition=Complete", "--timeout=420s", timeout=440)
    status = status_of(kubectl, name)
    losses = {metric["name"]: metric["value"] for metric in status["metrics"]}
    assert losses["train/loss"] < 3, "one short answer is soon learnt"
    manifest = kubectl("get", "ftj", name, "--output", "yaml")
    for text in manifest, kubectl("logs", f"{name}-1-head"), release("logs", "deployment/finetune-operator", "--tail", "-1"):
        assert teacher.KEY not in text
    kubectl("delete", "ftj", name)
    assert_all_gone(kubectl, name, 60)
