"""A whole job whose answers a judge compares: nobody is held while it does, its bias is reported, and it may be gone once all is judged."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.in_process import KilledError, run_job
from tests.tiny_llama import make_tiny_llama, write_questions
from tests.unit.trainer.fake_endpoint import FakeEndpoint, chat
from tests.unit.trainer_run.test_whole_loop import a_job

from finetune_trainer.report import Reporter


def first_always(path: str, body: dict[str, Any]) -> Any:
    """A judge that goes by the place."""
    return 200, {}, chat("Verdict: A")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    claim = tmp_path / "claims" / "data"
    make_tiny_llama(claim / "model")
    write_questions(claim / "train.jsonl", 24)
    write_questions(claim / "validation.jsonl", 6, start=100)
    (tmp_path / "claims" / "job").mkdir()
    (tmp_path / "secrets" / "judge").mkdir(parents=True)
    (tmp_path / "secrets" / "judge" / "token").write_text("sk-judge")
    return tmp_path


def judged(url: str) -> dict[str, Any]:
    judge = {"endpoint": {"url": url, "model": "large", "secretRef": {"name": "judge"}}}
    return {"name": "task", "source": "validation", "metrics": ["judgeWinRate"], "maxNewTokens": 4, "judge": judge}


def test_a_judge_that_goes_by_the_place_and_then_goes(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[int] = []
    announce = Reporter.announce

    def seen(self: Reporter, **changes: Any) -> None:
        announce(self, **changes)
        if not wanted or self.report.workers_wanted != wanted[-1]:
            wanted.append(self.report.workers_wanted)

    monkeypatch.setattr(Reporter, "announce", seen)
    training = {"epochs": 4, "globalBatchSize": 6, "maxSequenceLength": 64, "learningRate": 0.02, "precision": "float32", "packing": False}
    with FakeEndpoint(first_always) as server:
        evaluation, baseline = {"suites": [judged(server.url)]}, {"prompts": [{"name": "told", "system": "Say the digit."}]}
        job = a_job("job", training=training, evaluation=evaluation, baseline=baseline)
        with monkeypatch.context() as patch:
            patch.setattr("finetune_trainer.run.publish", killed)
            with pytest.raises(KilledError):
                run_job(job, inputs, patch)
        assert server.questions()
    assert wanted == [0, 1, 0, 1, 0]  # not while it compares the prompt's answers, and the tuned model's
    out = inputs / "claims" / "job" / "out"
    text = next(out.rglob("report.md")).read_text()
    assert "## Judges" in text
    assert "it chose the answer that stood first in 100% of its decisions" in text

    report = run_job(job, inputs, monkeypatch, attempt=2).report  # the judge is not there any more
    assert report.artifacts
    assert next(out.rglob("report.md")).read_text() == text
    (result,) = (json.loads(each.model_dump_json()) for each in report.evaluation.results if each.metric == "task/judgeWinRate")  # type: ignore[union-attr]
    assert result["value"] == 0.5


def killed(*_: Any, **__: Any) -> None:
    raise KilledError
