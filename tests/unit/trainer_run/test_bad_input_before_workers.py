"""What only the run can see of a bad job ends it with a closed reason before a worker is asked for."""

from pathlib import Path
from typing import Any

import pytest
import tenacity
from tests.in_process import run_job
from tests.tiny_llama import make_tiny_llama, write_questions
from tests.unit.trainer.fake_endpoint import FakeEndpoint, chat
from tests.unit.trainer_run.test_whole_loop import a_job

from finetune_api.reasons import Reason
from finetune_trainer import endpoint
from finetune_trainer.errors import JobError
from finetune_trainer.report import Reporter

EMPTY = {"source": "pvc://data/nothing"}
HANDBOOK = {"source": "pvc://data/handbook"}
GOLDEN = {"source": "pvc://data/train.jsonl", "column": "completion"}
CHOSEN = {"train": {"source": "pvc://data/chosen.jsonl"}}
SUITE = {"name": "task", "source": "validation", "metrics": ["f1"], "maxNewTokens": 4}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    claim = folder / "claims" / "data"
    make_tiny_llama(claim / "model")
    write_questions(claim / "train.jsonl", 12)
    write_questions(claim / "validation.jsonl", 6, start=100)
    (claim / "chosen.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello"}\n' * 4)
    (claim / "nothing").mkdir()
    (claim / "nothing" / "empty.md").write_text("\n")
    (claim / "handbook").mkdir()
    (claim / "handbook" / "digits.md").write_text("Numbers end in a digit, such as seven or two.")
    (folder / "secrets" / "judge").mkdir(parents=True)
    return folder


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many workers the head has asked for, each time that it said so."""
    found: list[int] = []
    announce, start_stage = Reporter.announce, Reporter.start_stage

    def announced(self: Reporter, **changes: Any) -> None:
        announce(self, **changes)
        found.append(self.report.workers_wanted)

    def started(self: Reporter, *given: Any, **changes: Any) -> None:
        start_stage(self, *given, **changes)
        found.append(self.report.workers_wanted)

    monkeypatch.setattr(Reporter, "announce", announced)
    monkeypatch.setattr(Reporter, "start_stage", started)
    return found


def failure(name: str, volumes: Path, monkeypatch: pytest.MonkeyPatch, **spec: Any) -> JobError:
    (volumes / "claims" / name).mkdir()
    with pytest.raises(JobError) as caught:
        run_job(a_job(name, **spec), volumes, monkeypatch)
    return caught.value


TEACHER = {"distillation": {"teacher": {"source": "pvc://data/no-teacher"}, "response": {}}}


@pytest.mark.parametrize(
    ("name", "spec", "reason", "field"),
    [
        (
            "targets",
            {"method": {"lora": {"targetModules": ["query"]}}},
            Reason.INVALID_SPEC,
            "method.lora.targetModules: no module is called",
        ),
        (
            "frozen",
            {"method": {"freeze": {"lastLayers": 9}}},
            Reason.INVALID_SPEC,
            "method.freeze.lastLayers is 9, but the model has 2 layers",
        ),
        (
            "virtual",
            {"method": {"promptTuning": {"numVirtualTokens": 256}}},
            Reason.INVALID_SPEC,
            "method.promptTuning.numVirtualTokens is 256",
        ),
        ("no-teacher", {"objective": TEACHER}, Reason.MODEL_NOT_FOUND, "objective.distillation.teacher: "),
        (
            "no-rejected",
            {"objective": {"dpo": {}}, "data": CHOSEN},
            Reason.DATASET_INVALID,
            "not chosen+rejected, which objective.dpo learns from",
        ),
        (
            "comparison",
            {"evaluation": {"suites": [SUITE], "compareWith": ["no-such-job"]}},
            Reason.COMPARISON_NOT_FOUND,
            "spec.evaluation.compareWith",
        ),
        (
            "points",
            {"data": {"preparation": {"contentPoints": {"knowledgeBase": EMPTY, "goldenOutputs": GOLDEN}}}},
            Reason.KNOWLEDGE_BASE_INVALID,
            "data.preparation.contentPoints.knowledgeBase",
        ),
        (
            "questions",
            {"data": {"preparation": {"questions": {"knowledgeBase": EMPTY}}}},
            Reason.KNOWLEDGE_BASE_INVALID,
            "data.preparation.questions.knowledgeBase",
        ),
        (
            "retrieval",
            {"evaluation": {"suites": [SUITE]}, "baseline": {"prompts": [{"name": "rag", "retrieval": {"knowledgeBase": EMPTY}}]}},
            Reason.KNOWLEDGE_BASE_INVALID,
            "baseline.prompts[0].retrieval.knowledgeBase",
        ),
        (
            "retrieval-beside-points",  # which the workers would write
            {
                "data": {"preparation": {"contentPoints": {"knowledgeBase": HANDBOOK, "goldenOutputs": GOLDEN}}},
                "evaluation": {"suites": [{**SUITE, "source": "pvc://data/validation.jsonl"}]},
                "baseline": {"prompts": [{"name": "plain"}, {"name": "rag", "retrieval": {"knowledgeBase": EMPTY}}]},
            },
            Reason.KNOWLEDGE_BASE_INVALID,
            "baseline.prompts[1].retrieval.knowledgeBase",
        ),
        (
            "questions-beside-points",
            {
                "data": {
                    "preparation": {
                        "contentPoints": {"knowledgeBase": HANDBOOK, "goldenOutputs": GOLDEN},
                        "questions": {"knowledgeBase": EMPTY},
                    }
                }
            },
            Reason.KNOWLEDGE_BASE_INVALID,
            "data.preparation.questions.knowledgeBase",
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_is_not_there_is_found_out_first(
    name: str, spec: dict[str, Any], reason: Reason, field: str, volumes: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = failure(name, volumes, monkeypatch, **spec)
    assert error.reason is reason
    assert field in error.message
    assert wanted
    assert not any(wanted)


@pytest.mark.parametrize(
    ("secret", "reason"),
    [(None, Reason.AUTHENTICATION_FAILED), ("empty", Reason.SECRET_NOT_FOUND), ("wrong", Reason.AUTHENTICATION_FAILED)],
    ids=["none", "empty", "wrong"],
)
def test_a_judge_that_does_not_open_without_its_secret(
    secret: str | None, reason: Reason, volumes: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: str, body: dict[str, Any]) -> Any:
        return 401, {}, chat("who are you")

    token = volumes / "secrets" / "judge" / "token"
    token.unlink(missing_ok=True)
    if secret == "wrong":
        token.write_text("sk-of-somebody-else")
    with FakeEndpoint(closed) as server:
        judge = {"url": server.url, "model": "large", **({"secretRef": {"name": "judge"}} if secret else {})}
        suite = {**SUITE, "metrics": ["judgeScore"], "judge": {"endpoint": judge}}
        error = failure(f"judge-{secret}".lower(), volumes, monkeypatch, evaluation={"suites": [suite]})
    assert error.reason is reason
    assert "evaluation.suites[0].judge" in error.message
    assert not any(wanted)


@pytest.mark.parametrize(
    ("name", "reply", "reason"),
    [
        ("refuses", lambda path, body: (401, {}, "no key"), Reason.AUTHENTICATION_FAILED),
        ("errs", lambda path, body: (502, {}, "bad gateway"), Reason.TEACHER_UNAVAILABLE),
        ("says-nothing", lambda path, body: (200, {}, chat("")), Reason.TEACHER_UNAVAILABLE),
        ("is-gone", None, Reason.TEACHER_UNAVAILABLE),
    ],
)
def test_a_served_teacher_that_does_not_answer(
    name: str, reply: Any, reason: Reason, volumes: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "RETRY_WAIT", tenacity.wait_none())
    with FakeEndpoint(reply or (lambda path, body: (401, {}, ""))) as server:
        teacher = {"endpoint": {"url": server.url, "model": "large"}}
        objective = {"distillation": {"teacher": teacher, "response": {}}}
        if reply is not None:
            error = failure(f"teacher-{name}", volumes, monkeypatch, objective=objective)
    if reply is None:
        error = failure(f"teacher-{name}", volumes, monkeypatch, objective=objective)
    assert error.reason is reason
    assert "objective.distillation.teacher.endpoint" in error.message
    assert not any(wanted)
