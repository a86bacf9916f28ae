"""A published model is measured again: the artifact itself, on data that has grown since, in one process from end to end."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.builders import raw_job
from tests.in_process import Finished, run_job
from tests.tiny_llama import make_tiny_llama, write_questions
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune_trainer.methods.bottleneck  # noqa: F401 - so that PEFT knows these adapters too
from finetune_api.monitoring_status import MonitoredResult
from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_operator.monitoring import judged
from finetune_trainer.errors import JobError

SUITES = [
    {"name": "task", "source": "validation", "metrics": ["loss", "exactMatch"], "maxNewTokens": 8},
    {"name": "other", "source": "validation", "metrics": ["f1"], "maxNewTokens": 8},
]
FRESH = {"schedule": "0 3 * * *", "suites": [{"name": "task", "source": "pvc://data/fresh.jsonl"}]}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    claim = folder / "claims" / "data"
    make_tiny_llama(claim / "model")
    write_questions(claim / "train.jsonl", 48)
    write_questions(claim / "validation.jsonl", 12, start=100)
    return folder


def a_job(name: str, method: Mapping[str, Any], **spec: Any) -> FineTuneJob:
    given = {
        "model": {"source": "pvc://data/model"},
        "data": {part: {"source": f"pvc://data/{part}.jsonl"} for part in ("train", "validation")},
        "method": method,
        "training": {"epochs": 8, "globalBatchSize": 4, "maxSequenceLength": 64, "learningRate": 0.02, "precision": "float32"},
        "compute": {"workers": {"min": 1, "max": 1}},
        "evaluation": {"suites": SUITES},
        "output": {"storage": f"pvc://{name}/out"},
        **spec,
    }
    manifest = raw_job(uid=name, **given)
    return parse_job({key: value for key, value in manifest.items() if key != "status"})


def publish(volumes: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: Mapping[str, Any]) -> dict[str, float]:
    """The figures that the job's model was released with."""
    (volumes / "claims" / name).mkdir(exist_ok=True)
    report = run_job(a_job(name, method), volumes, monkeypatch).report
    assert report.evaluation is not None
    return {result.metric: result.value for result in report.evaluation.results if result.value is not None}


def measure(volumes: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: Mapping[str, Any], attempt: int, **plan: Any) -> Finished:
    return run_job(a_job(name, method, monitoring={**FRESH, **plan}), volumes, monkeypatch, attempt=attempt)


def write_fresh(volumes: Path, rows: Iterable[Mapping[str, str]]) -> None:
    with (volumes / "claims" / "data" / "fresh.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def questions(numbers: Iterable[int], off: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"{number} ends in ", "completion": WORDS[(number + off) % 10]} for number in numbers]


def reference_loss(volumes: Path, name: str, rows: Iterable[Mapping[str, str]]) -> float:
    """The mean loss of the answers' tokens, by transformers and PEFT alone, one example at a time."""
    base, out = volumes / "claims" / "data" / "model", volumes / "claims" / name / "out"
    tokenizer = AutoTokenizer.from_pretrained(base)
    if (out / "model").exists():
        model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out / "adapter")).eval()
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


def test_a_model_that_holds_and_one_that_degrades_are_told_apart(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = {"full": {}}  # of a model with random weights that alone learns something
    released = publish(volumes, monkeypatch, "drift", method)
    plan = a_job("drift", method, monitoring=FRESH).spec.monitoring
    assert plan is not None

    def verdicts(done: Finished) -> dict[str, str | None]:
        return {
            each.metric: judged(MonitoredResult(**each.model_dump(), released=released[each.metric]), plan).verdict
            for each in done.report.fresh
        }

    known = questions(range(100, 112))
    write_fresh(volumes, known)
    held = measure(volumes, monkeypatch, "drift", method, 2)
    figures = {each.metric: each for each in held.report.fresh}
    assert list(figures) == ["task/loss", "task/exactMatch"]
    assert figures["task/loss"].value == pytest.approx(released["task/loss"], rel=1e-5)  # the same examples as at the release
    assert figures["task/loss"].value == pytest.approx(reference_loss(volumes, "drift", known), rel=1e-4)
    assert figures["task/exactMatch"].value == released["task/exactMatch"]
    assert {each.n for each in held.report.fresh} == {12}
    assert set(verdicts(held).values()) == {"Held"}

    # The world has moved on: the right answers are in capitals now, which the model has never seen, and there are more of them.
    moved = [{**row, "completion": row["completion"].upper()} for row in questions(range(100, 130))]
    write_fresh(volumes, moved)
    worse = measure(volumes, monkeypatch, "drift", method, 3)
    loss = next(each for each in worse.report.fresh if each.metric == "task/loss")
    assert loss.n == 30
    assert loss.value == pytest.approx(reference_loss(volumes, "drift", moved), rel=1e-4)
    assert loss.low is not None
    assert loss.low > released["task/loss"]
    assert verdicts(worse)["task/loss"] == "Degraded"


@pytest.mark.parametrize(
    "method",
    [{"full": {}}, {"adapter": {}}, {"ia3": {}}, {"promptTuning": {"numVirtualTokens": 4}}, {"prefixTuning": {"numVirtualTokens": 4}}],
    ids=lambda method: next(iter(method)),
)
def test_what_is_measured_is_what_was_published(method: dict[str, Any], volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the very examples of the release, every kind of artifact has the figures that it was released with."""
    name = f"same-{next(iter(method)).lower()}"
    released = publish(volumes, monkeypatch, name, method)
    write_fresh(volumes, questions(range(100, 112)))
    for path in (volumes / "claims" / name / "out" / ".finetune" / name / "checkpoints").rglob("*.safetensors"):
        path.unlink()  # the artifact, not what the training has left
    figures = {each.metric: each.value for each in measure(volumes, monkeypatch, name, method, 2).report.fresh}
    assert figures["task/loss"] == pytest.approx(released["task/loss"], rel=1e-5)
    assert figures["task/exactMatch"] == released["task/exactMatch"]


def test_a_run_leaves_the_release_as_it_is(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = {"lora": {}}
    publish(volumes, monkeypatch, "kept", method)
    out = volumes / "claims" / "kept" / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write_fresh(volumes, questions(range(300, 306)))
    first = measure(volumes, monkeypatch, "kept", method, 2)
    own = out / ".finetune" / "kept" / "monitoring"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and not path.is_relative_to(own)} == before
    answers = own / "answers" / "published" / "task.jsonl"
    assert len(answers.read_text().splitlines()) == 6
    # The next run asks anew, though its cases have the same names.
    write_fresh(volumes, questions(range(300, 306), off=1))
    second = measure(volumes, monkeypatch, "kept", method, 3)
    assert second.report.fresh[0].value != first.report.fresh[0].value
    assert not any(stage.state == "Running" for stage in second.report.stages if stage.name in ("Train", "Publish"))


def test_of_a_suite_with_a_limit_the_newest_examples_are_measured(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = {"lora": {}}
    limited = {"evaluation": {"suites": [{**SUITES[0], "limit": 5}]}, "monitoring": FRESH}
    (volumes / "claims" / "newest").mkdir()
    run_job(a_job("newest", method, evaluation=limited["evaluation"]), volumes, monkeypatch)
    rows = [*questions(range(20), off=3), *questions(range(500, 505))]
    write_fresh(volumes, rows)
    figure = run_job(a_job("newest", method, **limited), volumes, monkeypatch, attempt=2).report.fresh[0]
    assert figure.n == 5
    assert figure.value == pytest.approx(reference_loss(volumes, "newest", rows[-5:]), rel=1e-4)


def test_what_is_wrong_is_said_before_workers_are_asked_for(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = {"lora": {}}
    (volumes / "claims" / "faults").mkdir()
    write_fresh(volumes, questions(range(4)))
    with pytest.raises(JobError, match="no longer holds the report") as nothing:
        measure(volumes, monkeypatch, "faults", method, 2)
    assert nothing.value.reason == Reason.MODEL_NOT_FOUND
    publish(volumes, monkeypatch, "faults", method)
    write_fresh(volumes, [*questions(range(3)), {"prompt": "no answer"}])
    with pytest.raises(JobError, match=r"monitoring\.suites\[0\]: 1 row cannot be used") as bad:
        measure(volumes, monkeypatch, "faults", method, 3)
    assert bad.value.reason == Reason.DATASET_INVALID
    (volumes / "claims" / "data" / "fresh.jsonl").unlink()
    with pytest.raises(JobError) as absent:
        measure(volumes, monkeypatch, "faults", method, 4)
    assert absent.value.reason == Reason.DATASET_NOT_FOUND
    write_fresh(volumes, questions(range(4)))
    manifest = volumes / "claims" / "faults" / "out" / "adapter" / "manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**told, "job": {**told["job"], "uid": "another"}}))
    with pytest.raises(JobError, match="adapter no longer holds what this job has published"):
        measure(volumes, monkeypatch, "faults", method, 5)
