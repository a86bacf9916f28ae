"""Answers on real Ray, two workers: of several models one after the other, around a training, with a worker that is killed on the way."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.trainer import harness
from tests.integration.trainer.answering_head import CASES, cases
from tests.integration.trainer.harness import Pods
from tests.tiny_llama import make_tiny_llama, write_questions
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.report import Report

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

ANSWERS = "from tests.integration.trainer import answering_head; answering_head.install(); "
EPOCHS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_llama(folder / "model")
    make_tiny_llama(folder / "other", seed=5)
    write_questions(folder / "train.jsonl", 60)
    write_questions(folder / "validation.jsonl", 10, start=100)
    return folder


def test_models_answer_before_and_after_a_training_whoever_is_killed(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PATIENCE", 800.0)  # four groups of workers are started
    output = tmp_path / "out"
    spec: dict[str, Any] = {
        "model": {"source": f"file://{inputs}/model"},
        "data": {name: {"source": f"file://{inputs}/{name}.jsonl"} for name in ("train", "validation")},
        "method": {"lora": {"rank": 4}},
        "training": {
            "epochs": EPOCHS,
            "globalBatchSize": 12,
            "maxSequenceLength": 64,
            "packing": False,
            "learningRate": 0.01,
            "precision": "float32",
        },
        "compute": {"workers": {"min": 2, "max": 2}},
        "output": {"storage": f"file://{output}"},
    }
    with Pods(tmp_path / "pods", spec, prelude=ANSWERS) as pods:
        pods.start_head()
        at = pods.follow(answering("baseline"))
        assert at is not None, pods.log()
        victims = pods.training_processes()
        assert len(victims) == 2
        os.kill(victims[1], signal.SIGKILL)
        _, report = pods.ended()
        assert report.failure is not None
        assert report.failure.message == "the answers are there", pods.log()
        folder = output / ".finetune" / pods.uid / "answers"
        found = {path.name: answered(path / "task.jsonl") for path in sorted(folder.iterdir())}
    assert list(found) == ["baseline", "model-other", f"step-{EPOCHS * 5}"]
    for answers in found.values():
        assert [each["id"] for each in answers] == [case.id for case in cases()]
    for name, model in (("baseline", "model"), ("model-other", "other")):
        loss, labels = by_transformers(inputs / model, 20)
        assert sum(each["labels"] for each in found[name][:20]) == labels
        assert sum(each["loss"] for each in found[name][:20]) == pytest.approx(loss, rel=1e-4)
    means = {name: sum(each["loss"] for each in answers) / CASES for name, answers in found.items()}
    assert means[f"step-{EPOCHS * 5}"] < means["baseline"] - 0.5
    assert found["baseline"][0]["text"] != found["model-other"][0]["text"]


def answering(candidate: str) -> Any:
    def far_enough(report: Report) -> bool:
        words = report.message.split()
        return report.message.startswith(f"{candidate}, suite task: ") and 0 < int(words[3]) < CASES

    return far_enough


def answered(path: Path) -> list[dict[str, Any]]:
    return [{"correct": 0, "text": "", **json.loads(line)} for line in path.read_text().splitlines()]


def by_transformers(folder: Path, count: int) -> tuple[float, int]:
    """Loss and number of the tokens of the first references, the end token with them."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    total, labels = 0.0, 0
    for case in cases()[:count]:
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (case.prompt, case.reference))
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        places = range(len(prompt), ids.shape[1])
        total -= sum(float(logs[place - 1, ids[0, place]]) for place in places)
        labels += len(places)
    return total, labels
