"""The whole way on a real cluster, by what a user types: apply, watch, wait, delete; and what happens when things go wrong on the way."""

import base64
import json
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from tests.e2e.kubectl import Kubectl, assert_all_gone, left_of, wait_until
from tests.e2e.names import CHART, CLAIM, CONFIG_MAP, DATA, QUICKSTART, RELEASE, SYSTEM

from finetune_api import LABEL_JOB_NAME, LABEL_JOB_UID, LABEL_ROLE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ANSWERED = 0.6
"""Share of the test's questions that the tuned model must answer word for word."""


ENDLESS = {"epochs": 1000, "globalBatchSize": 8, "maxSequenceLength": 128}
"""A training that does not end before the test does."""


def job(name: str, **spec: Any) -> dict[str, Any]:
    """A small job of 120 steps or so on the quickstart's model and data; `spec` replaces top-level fields."""
    defaults = {
        "model": {"source": f"pvc://{CLAIM}/models/tiny-llama"},
        "data": {"train": {"source": f"pvc://{CLAIM}/support/validation.jsonl"}},
        "method": {"lora": {}},
        "training": {"epochs": 40, "globalBatchSize": 8, "maxSequenceLength": 128},
        "checkpoint": {"everySteps": 5},
        "output": {"storage": f"pvc://{CLAIM}/out-{name}"},
    }
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": {**defaults, **spec}}


def pods_of(kubectl: Kubectl, name: str, role: str) -> list[str]:
    return kubectl.names("pods", f"{LABEL_JOB_NAME}={name},{LABEL_ROLE}={role}")


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((each for each in status.get("conditions", []) if each["type"] == kind), {})


def status_of(kubectl: Kubectl, name: str) -> dict[str, Any]:
    return dict(kubectl.get("finetunejob", name).get("status", {}))


def test_quickstart_from_manifest_to_tuned_answers(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    kubectl("create", "configmap", CONFIG_MAP, f"--from-file={DATA}")
    kubectl.apply_file(QUICKSTART)
    name = next(item["metadata"]["name"] for item in yaml.safe_load_all(QUICKSTART.read_text()) if item["kind"] == "FineTuneJob")

    workers = [f"pod/{name}-1-worker-0", f"pod/{name}-1-worker-1"]
    wait_until("two workers", lambda: sorted(pods_of(kubectl, name, "worker")) == workers, 180)
    (secret,) = kubectl.get("secrets", "--selector", f"{LABEL_JOB_NAME}={name}")["items"]
    token = base64.b64decode(secret["data"]["attempt-token"]).decode()
    kubectl("wait", f"finetunejob/{name}", "--for=condition=Complete", "--timeout=420s", timeout=440)

    found = kubectl.get("finetunejob", name)
    status = found["status"]
    assert status["phase"] == "Complete"
    assert status["attempt"]["number"] == 1
    assert [stage["state"] for stage in status["stages"]] == ["Succeeded"] * 4
    results = {result["metric"]: result for result in status["evaluation"]["results"]}
    assert results["test/loss"]["value"] < results["test/loss"]["baseline"]
    assert status["artifacts"][0]["kind"] == "adapter"

    header, row = kubectl("get", "ftj", name).strip().splitlines()
    assert header.split() == ["NAME", "PHASE", "PROGRESS", "LOSS", "GATES", "AGE"]
    assert row.split()[:3] == [name, "Complete", "100"]
    assert "ATTEMPT" in kubectl("get", "ftj", name, "--output", "wide")

    manifest = kubectl("get", "ftj", name, "--output", "yaml")
    assert "finalizers" not in found["metadata"]
    assert "kopf" not in manifest
    for text in manifest, kubectl("logs", f"{name}-1-head"), release("logs", f"deployment/{RELEASE}", "--tail", "-1"):
        assert token not in text
    assert {event["reason"] for event in kubectl.get("events")["items"] if event["involvedObject"]["name"] == name} >= {
        "Accepted",
        "Succeeded",
    }
    # The finished head stays so that its log can be read; what held resources or secrets has gone.
    wait_until("only the head is left", lambda: left_of(kubectl, name) == [f"pod/{name}-1-head"], 60)

    questions = [json.loads(line)["messages"] for line in (DATA / "test.jsonl").read_text().splitlines()[::4]]
    adapter = found["spec"]["output"]["storage"].removeprefix(f"pvc://{CLAIM}") + "/adapter"
    model = found["spec"]["model"]["source"].removeprefix(f"pvc://{CLAIM}")
    answers = json.loads(kubectl.python(storage, _ASK, f"/storage{model}", f"/storage{adapter}", stdin=json.dumps(questions).encode()))
    expected = [messages[-1]["content"] for messages in questions]
    assert right(answers["untuned"], expected) == 0
    assert right(answers["tuned"], expected) >= ANSWERED * len(expected)

    kubectl("delete", "ftj", name)
    assert_all_gone(kubectl, name, 60)


def right(answers: list[str], expected: list[str]) -> int:
    return sum(answer == wanted for answer, wanted in zip(answers, expected, strict=True))


_ASK = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

def answers(model, tokenizer, questions):
    found = []
    for messages in questions:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=60, do_sample=False)
        found.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True).strip())
    return found

questions = json.load(sys.stdin)
base, adapter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
untuned = answers(model, tokenizer, questions)
tuned = answers(PeftModel.from_pretrained(model, adapter), tokenizer, questions)
print(json.dumps({"untuned": untuned, "tuned": tuned}))
"""


def test_lost_head_is_replaced_and_the_training_goes_on(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    name = "resumes"
    kubectl.apply(job(name))

    def saved() -> dict[str, Any] | None:
        status = status_of(kubectl, name)
        latest = status.get("checkpoints", {}).get("latest")
        return status if latest and latest["step"] >= 10 else None

    before = wait_until("a checkpoint", saved, 240)
    assert before["phase"] == "Training", "the job is too short for this test"
    kubectl("delete", "pod", f"{name}-1-head", "--grace-period=0", "--force")

    kubectl("wait", f"finetunejob/{name}", "--for=condition=Complete", "--timeout=420s", timeout=440)
    status = status_of(kubectl, name)
    assert status["attempt"]["number"] == 2
    assert (status["attempt"]["preemptions"], status["attempt"]["failures"]) == (1, 0)
    assert status["progress"]["step"] == status["progress"]["totalSteps"]
    # From its start the training would have had to do these steps again.
    assert status["attempt"]["lostSteps"] < before["checkpoints"]["latest"]["step"]
    kubectl("delete", "ftj", name)
    assert_all_gone(kubectl, name, 60)


def test_job_deleted_while_the_operator_is_away_leaves_nothing(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    name = "deleted"
    kubectl.apply(job(name, training=ENDLESS))
    wait_until("the head runs", lambda: kubectl.names("pods", f"{LABEL_JOB_NAME}={name}") and _running(kubectl, f"{name}-1-head"), 120)
    kinds = {item.split("/")[0] for item in left_of(kubectl, name)}
    assert kinds >= {"pod", "configmap", "secret", "service", "networkpolicy.networking.k8s.io"}
    try:
        _scale(release, 0)
        kubectl("delete", "finetunejob", name, timeout=30)
        assert_all_gone(kubectl, name, 120)
    finally:
        _scale(release, 1)
    assert left_of(kubectl, name) == []


def _running(kubectl: Kubectl, pod: str) -> bool:
    found = kubectl.find("pod", pod)
    return found is not None and found["status"].get("phase") == "Running"


def _scale(release: Kubectl, replicas: int) -> None:
    release("scale", f"deployment/{RELEASE}", f"--replicas={replicas}")
    if replicas:
        release("rollout", "status", f"deployment/{RELEASE}", "--timeout=120s", timeout=140)
    else:
        wait_until("the operator has gone", lambda: not release.names("pods"), 60)


@pytest.mark.parametrize(
    ("name", "spec", "reason", "words"),
    [
        (
            "no-config-map",
            {"data": {"train": {"configMap": {"name": "absent-data", "key": "train.jsonl"}}}},
            "ConfigMapNotFound",
            "absent-data",
        ),
        ("no-claim", {"data": {"train": {"source": "pvc://absent-claim/train.jsonl"}}}, "VolumeClaimNotFound", "absent-claim"),
        (
            "no-secret",
            {"model": {"source": "hf://example/model", "secretRef": {"name": "absent-secret"}}},
            "SecretNotFound",
            "absent-secret",
        ),
    ],
)
def test_what_a_job_names_and_the_namespace_lacks_is_said_before_a_worker_exists(
    release: Kubectl, kubectl: Kubectl, storage: str, name: str, spec: dict[str, Any], reason: str, words: str
) -> None:
    kubectl.apply(job(name, **spec))
    said = wait_until(f"{reason}", lambda: _says(kubectl, name, reason), 90)
    assert words in said["message"]
    assert pods_of(kubectl, name, "worker") == []
    assert "absent" in kubectl("get", "ftj", name, "--output", "wide")
    kubectl("delete", "ftj", name)
    assert_all_gone(kubectl, name, 90)


def _says(kubectl: Kubectl, name: str, reason: str) -> dict[str, Any] | None:
    """The condition that tells why the job does not move."""
    said = condition(status_of(kubectl, name), "Reconciling")
    return said if said.get("reason") == reason else None


def test_bad_row_is_named_and_costs_no_worker(release: Kubectl, kubectl: Kubectl, storage: str, tmp_path: Path) -> None:
    name = "bad-row"
    rows = (DATA / "train.jsonl").read_text().splitlines()[:2]
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, '{"messages": [']) + "\n")
    kubectl("create", "configmap", "bad-data", f"--from-file={tmp_path}/train.jsonl")
    kubectl.apply(job(name, data={"train": {"configMap": {"name": "bad-data", "key": "train.jsonl"}}}))
    kubectl("wait", f"finetunejob/{name}", "--for=condition=Failed", "--timeout=120s", timeout=140)
    failure = status_of(kubectl, name)["failure"]
    assert (failure["stage"], failure["reason"], failure["retryable"]) == ("Prepare", "DatasetInvalid", False)
    assert "train.jsonl" in failure["message"]
    assert "line 3" in failure["message"]
    workers = [event for event in kubectl.get("events")["items"] if f"{name}-1-worker" in event["involvedObject"]["name"]]
    assert workers == []
    kubectl("delete", "ftj", name)
    assert_all_gone(kubectl, name, 60)


def test_upgrade_keeps_the_key_and_running_pods(release: Kubectl, kubectl: Kubectl, storage: str) -> None:
    name = "upgraded"
    kubectl.apply(job(name, training=ENDLESS))
    wait_until("the job trains", lambda: status_of(kubectl, name).get("phase") == "Training", 120)
    key = release.get("secret", f"{RELEASE}-token-key")["data"]["token-key"]
    pods = {pod["metadata"]["uid"] for pod in kubectl.get("pods", "--selector", LABEL_JOB_UID)["items"]}
    with helm_python.Config(namespace=SYSTEM) as helm:
        values = helm.get_values(RELEASE)
        values["operator"]["pollSeconds"] = 3
        helm.upgrade(str(CHART), RELEASE, values, wait="watcher", timeout=180)
    assert release.get("secret", f"{RELEASE}-token-key")["data"]["token-key"] == key
    step = status_of(kubectl, name)["progress"]["step"]
    wait_until("the job is followed on", lambda: status_of(kubectl, name)["progress"]["step"] > step, 60)
    assert {pod["metadata"]["uid"] for pod in kubectl.get("pods", "--selector", LABEL_JOB_UID)["items"]} >= pods
    kubectl("delete", "ftj", name)
    assert_all_gone(kubectl, name, 90)
