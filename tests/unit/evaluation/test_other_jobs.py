"""A report is in its place whole, whatever came of the job; and other jobs find its results by the job's name."""

import json
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from tests.unit.evaluation.findings import BASELINES, EVALUATION, RESULTS, SEARCH, TRIALS, UID, course, findings, job

from finetune_api.reasons import Reason
from finetune_api.status import ComparedResult, EvaluationResult
from finetune_api.v1alpha1 import FineTuneJob, ModelReference, Suite
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation import evidence
from finetune_trainer.evaluation.answered import Answered, Case, written
from finetune_trainer.evaluation.evidence import publish_report, report_uri
from finetune_trainer.evaluation.history import Course
from finetune_trainer.evaluation.others import beside, find_others, reached
from finetune_trainer.evaluation.scores import Measured, changes, measured, results
from finetune_trainer.manifest import damage, read_manifest, write_manifest
from finetune_trainer.storage import Storage

OTHER_UID = "0c9e6a52-0000-4000-8000-000000000002"
FOLDER = "report/team-a/support-bot-v1"


@pytest.fixture(params=["file system", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "file system":
        return Storage(LocalFileSystem(), str(tmp_path / "root"), f"file://{tmp_path}/root")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return Storage(MemoryFileSystem(), "/bucket/root", "s3://bucket/root")


def this_job(*names: str) -> FineTuneJob:
    return job(evaluation={"compareWith": list(names)})


def publish_other(storage: Storage, **changes: Any) -> str:
    """With one picture: drawing takes a while."""
    less = {"results": RESULTS[2:3], "baseline": (), "course": Course(), "trials": (), **changes}
    return publish_report(storage, findings(job=job("support-bot-v1", OTHER_UID, search=SEARCH), **less))


def not_found(storage: Storage, name: str = "support-bot-v1") -> str:
    with pytest.raises(JobError) as caught:
        find_others(storage, this_job("baseline", name))
    assert caught.value.reason is Reason.COMPARISON_NOT_FOUND
    assert caught.value.message.startswith("spec.evaluation.compareWith: ")
    return caught.value.message


def test_a_report_is_in_its_place_with_a_manifest_of_its_files(storage: Storage) -> None:
    uri = publish_other(storage, course=course(), baseline=BASELINES, trials=TRIALS)
    assert uri == report_uri(storage, job("support-bot-v1")) == storage.locate(f"{FOLDER}/report.md")
    manifest = read_manifest(storage, FOLDER) or {}
    assert manifest["job"] == {"namespace": "team-a", "name": "support-bot-v1", "uid": OTHER_UID}
    assert sorted(manifest["files"]) == ["loss.svg", "metrics-1.svg", "prompts.svg", "report.md", "results.json", "search.svg"]
    with storage.folder(FOLDER) as folder:
        assert damage(folder, manifest) is None
        assert (folder / "report.md").read_text().startswith("# support-bot-v1: held back")


def test_doing_it_again_changes_nothing(storage: Storage) -> None:
    publish_other(storage)
    first = read_manifest(storage, FOLDER)
    publish_other(storage)
    assert read_manifest(storage, FOLDER) == first


def test_jobs_of_one_name_in_two_namespaces_have_a_report_each(storage: Storage) -> None:
    publish_other(storage)
    theirs = job("support-bot-v1", UID)
    theirs = theirs.model_copy(update={"metadata": theirs.metadata.model_copy(update={"namespace": "team-b"})})
    publish_report(storage, findings(job=theirs, gates=(), results=(), baseline=(), course=Course()))
    assert [other.evaluation.gates for other in find_others(storage, this_job("support-bot-v1"))] == [EVALUATION.gates]


def test_a_picture_that_cannot_be_drawn_is_left_out_and_told_of(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> bytes:
        raise RuntimeError("no font")

    monkeypatch.setattr(evidence, "loss_curves", fails)
    publish_other(storage, course=course())
    assert "loss.svg" not in (read_manifest(storage, FOLDER) or {})["files"]
    assert "no font" in caplog.text
    assert "loss.svg" not in (storage.read_text(f"{FOLDER}/report.md") or "loss.svg")


def test_results_are_found_by_the_jobs_name_in_the_order_of_the_spec(storage: Storage) -> None:
    publish_other(storage, results=RESULTS)
    publish_report(storage, findings(job=job("another", UID.replace("1", "3")), gates=(), results=(), baseline=(), course=Course()))
    others = find_others(storage, this_job("support-bot-v1", "baseline", "another"))
    assert [other.name for other in others] == ["support-bot-v1", "another"]
    assert others[0].evaluation == EVALUATION
    found = others[0].result("task/f1")
    assert found is not None
    assert found.value == 0.88
    assert others[0].result("task/unknown") is None
    assert others[1].result("task/f1") is None


def test_only_the_baseline_needs_nothing(storage: Storage) -> None:
    assert find_others(storage, this_job("baseline")) == ()


def test_a_job_without_results_is_told_with_what_to_do(storage: Storage) -> None:
    assert not_found(storage, "nobody") == (
        f"spec.evaluation.compareWith: {storage.locate('report/team-a/nobody')} holds no results of the job nobody: name a job of the "
        "namespace team-a that was measured with the same output.storage, or leave it out"
    )


@pytest.mark.parametrize("owner", [{"uid": "../../elsewhere"}, {"uid": ""}, {"uid": "a/b"}, {"uid": None}, {"uid": 7}, {}, "me", None])
def test_a_manifest_cannot_lead_out_of_the_storage(storage: Storage, owner: object) -> None:
    with storage.new_folder(FOLDER) as folder:
        (folder / "results.json").write_text(json.dumps({"evaluation": EVALUATION.to_json()}))
        write_manifest(folder, {"job": owner, "files": {}})
    not_found(storage)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"evaluation": 1}', '{"evaluation": {"results": [{"value": 1}]}}', "[" * 100_000],
    ids=lambda text: text[:9],
)
def test_results_that_are_none_are_told(storage: Storage, content: str) -> None:
    with storage.new_folder(FOLDER) as folder:
        (folder / "results.json").write_text(content)
        write_manifest(folder, {"job": {"uid": OTHER_UID}, "files": {}})
    assert "cannot be read" in not_found(storage)


def leave(storage: Storage, cases: list[Case], answers: list[Answered], candidate: int = 600) -> None:
    """What the other job's workers have left in its own folder."""
    storage.write_text(f".finetune/{OTHER_UID}/suites/task.jsonl", "".join(written(cases)))
    storage.write_text(f".finetune/{OTHER_UID}/answers/step-{candidate}/task.jsonl", "".join(written(answers)))


def test_answers_to_the_same_cases_are_paired_whatever_their_places(storage: Storage) -> None:
    publish_other(storage)
    leave(
        storage,
        [Case("0", "r0", prompt="p0", place="a:1"), Case("1", "r1", prompt="p1"), Case("2", "r2", prompt="p2")],
        [Answered("0", "said 0", 1.5, 3, 2), Answered("1", "said 1"), Answered("2", "said\u20282\x85")],
    )
    (other,) = find_others(storage, this_job("support-bot-v1"))
    mine = [
        Case("a", "r2", prompt="p2"),
        Case("b", "other reference", prompt="p1"),
        Case("c", "r0", prompt="p0", place="elsewhere"),
        Case("d", "r0", messages=({"role": "user", "content": "p0"},)),
    ]
    assert other.answers("task", mine) == (Answered("a", "said\u20282\x85"), Answered("c", "said 0", 1.5, 3, 2))


@pytest.mark.parametrize(
    "text", ["", "no json\n", "[1]\n", '{"id": 1, "unknown": 2}\n{}\n', "\xff", "[" * 100_000], ids=lambda text: text[:9]
)
def test_answers_that_are_not_there_any_more_are_none(storage: Storage, text: str) -> None:
    publish_other(storage)
    leave(storage, [Case("0", "r0", prompt="p0")], [], candidate=600)
    storage.write_text(f".finetune/{OTHER_UID}/answers/step-600/task.jsonl", text)
    (other,) = find_others(storage, this_job("support-bot-v1"))
    assert other.answers("task", [Case("0", "r0", prompt="p0")]) == ()
    assert other.answers("absent", [Case("0", "r0", prompt="p0")]) == ()


def test_a_job_that_trained_nothing_has_no_answers(storage: Storage) -> None:
    publish_other(storage, candidate=None)
    leave(storage, [Case("0", "r0", prompt="p0")], [Answered("0", "x")])
    assert find_others(storage, this_job("support-bot-v1"))[0].answers("task", [Case("0", "r0", prompt="p0")]) == ()


TASK = Suite(
    name="task", source="test", metrics=("exactMatch", "tokenAccuracy", "embeddingSimilarity"), encoder=ModelReference(source="hf://o/e")
)
JUDGED = EvaluationResult(metric="task/embeddingSimilarity", value=0.5, low=0.4, high=0.6, n=4)


def test_figures_of_another_job_are_paired_where_it_was_asked_the_same(storage: Storage) -> None:
    """Three of the four cases are the other's too; it knows two of these answers, this job all."""
    publish_other(
        storage, results=(JUDGED, EvaluationResult(metric="test/loss", value=1.25), EvaluationResult(metric="task/f1", value=None))
    )
    cases = [Case(f"{place}", f"r{place}", prompt=f"p{place}") for place in range(4)]
    leave(
        storage,
        [Case(f"x{place}", f"r{place}", prompt=f"p{place}") for place in (2, 1, 0)],
        [Answered("x2", "wrong", 1.0, 4, 1), Answered("x1", "r1", 1.0, 4, 3), Answered("x0", "wrong", 1.0, 2, 1)],
    )
    (other,) = find_others(storage, this_job("support-bot-v1"))
    theirs = reached(other, [(TASK, cases)], 0.95)
    assert {each.metric: (each.value, each.n) for each in theirs} == {
        "task/embeddingSimilarity": (0.5, 4),
        "test/loss": (1.25, 0),
        "task/exactMatch": (pytest.approx(1 / 3), 3),
        "task/tokenAccuracy": (0.5, 3),
    }
    mine = measured(
        TASK, cases, [Answered(case.id, case.reference, 1.0, 1, 1) for case in cases], 0.95, {"embeddingSimilarity": [0.9, 0.9, 0.7, 0.7]}
    )
    differences = changes(mine, theirs, 0.95)
    known = {each.metric: (each.value, each.paired) for each in differences}
    # Over the three cases that both know, this job is right in all of them.
    assert known["task/exactMatch"] == (pytest.approx(2 / 3), True)
    assert known["task/embeddingSimilarity"] == (pytest.approx(0.3), False)
    told = {each.metric: each.compared for each in beside(results(mine, (), ()), {other.name: theirs}, {other.name: differences})}
    (compared,) = told["task/exactMatch"]
    assert (compared.other, compared.value) == ("support-bot-v1", pytest.approx(1 / 3))
    assert compared.difference is not None
    assert compared.difference.value == pytest.approx(2 / 3)


def test_what_the_other_was_not_measured_by_is_not_beside() -> None:
    known = EvaluationResult(metric="task/f1", value=0.5)
    theirs = {"other": [Measured("task/f1", None), Measured("task/bleu", 3.0)], "another": [Measured("task/f1", 0.25)]}
    (told,) = beside([known], theirs, {})
    assert told.compared == (ComparedResult(other="another", value=0.25),)
