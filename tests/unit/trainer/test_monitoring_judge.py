"""A measuring run whose suite has a judge: the win rate is against the untuned model's answers to the fresh prompts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint, chat
from tests.builders import raw_job
from tests.in_process import run_job
from tests.tiny_llama import make_tiny_llama, write_questions

from finetune_api.v1alpha1 import FineTuneJob, parse_job


def a_job(suite: dict[str, Any], **spec: Any) -> FineTuneJob:
    manifest = raw_job(
        uid="judged",
        model={"source": "pvc://data/model"},
        data={"train": {"source": "pvc://data/train.jsonl"}, "validation": {"source": "pvc://data/held.jsonl"}},
        method={"full": {}},
        training={"epochs": 4, "globalBatchSize": 4, "maxSequenceLength": 64, "learningRate": 0.02, "precision": "float32"},
        compute={"workers": {"min": 1, "max": 1}},
        output={"storage": "pvc://out/bot"},
        evaluation={"suites": [{"name": "task", "source": "validation", "maxNewTokens": 6, **suite}]},
        **spec,
    )
    return parse_job({key: value for key, value in manifest.items() if key != "status"})


def longer_is_better(_: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    asked = body["messages"][0]["content"]
    found = {name: text for name, _, text in re.findall(r"\[BEGIN (ANSWER [AB]) ([0-9a-f]{16})\]\n(.*?)\n\[END \1 \2\]", asked, re.DOTALL)}
    first, second = (len(found.get(f"ANSWER {place}", "")) for place in "AB")
    return 200, {}, chat(f"Verdict: {'tie' if first == second else 'A' if first > second else 'B'}")


def test_wins_are_against_the_untuned_models_answers_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = tmp_path / "claims" / "data"
    (tmp_path / "claims" / "out").mkdir(parents=True)
    make_tiny_llama(claim / "model")
    write_questions(claim / "train.jsonl", 24)
    write_questions(claim / "held.jsonl", 4, start=50)
    write_questions(claim / "fresh.jsonl", 5, start=80)
    run_job(a_job({"metrics": ["exactMatch"]}), tmp_path, monkeypatch)
    plan = {"schedule": "0 3 * * *", "suites": [{"name": "task", "source": "pvc://data/fresh.jsonl"}]}
    with FakeEndpoint(longer_is_better) as server:
        judged = {"metrics": ["judgeWinRate"], "judge": {"endpoint": {"url": server.url, "model": "large"}}}
        (figure,) = run_job(a_job(judged, monitoring=plan), tmp_path, monkeypatch, attempt=2).report.fresh
    answers = tmp_path / "claims" / "out" / "bot" / ".finetune" / "judged" / "monitoring" / "answers"
    published, untuned = (
        [len(json.loads(line)["text"].strip()) for line in (answers / name / "task.jsonl").read_text().splitlines()]
        for name in ("published", "baseline")
    )
    assert len(published) == len(untuned) == figure.n == 5
    wins = [1.0 if mine > other else 0.0 if mine < other else 0.5 for mine, other in zip(published, untuned, strict=True)]
    assert set(wins) != {0.5}  # the two models say different things
    assert figure.value == pytest.approx(sum(wins) / 5)
