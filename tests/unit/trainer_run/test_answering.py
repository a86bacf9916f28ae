"""Suites are answered by all workers once: what one that was killed had written is not asked again, and the end is the same."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import CONFIG, CPU, DATA, Listener, Together, manifest_with, storage_in
from transformers import AutoTokenizer

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import ModelSource, parse_job
from finetune_trainer import answering
from finetune_trainer.answering import Asking, Candidate, Questions, Told, answer, outstanding, read_answers, read_cases, write_cases
from finetune_trainer.candidates import Candidates
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.generation import Reply
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model import load_model
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

QUESTIONS = Questions("task", max_new_tokens=5, losses=False)
SOMEBODY = Candidate("prompt-short", (QUESTIONS,))
CASES = [Case(f"{number:06d}", "yes", prompt="ab" * (number % 7)) for number in range(23)]


class Parrot:
    """Says what it is asked. Is killed where it is to answer more cases than it may."""

    def __init__(self, may: int = 1000) -> None:
        self.heard: list[str] = []
        self.may = may
        self.finished = 0
        self.voice = SimpleNamespace(context=100)

    def prompt(self, case: Case) -> str:
        return f"{case.id} {case.prompt}"

    def replies(self, prompts: Sequence[str], most: int) -> list[Reply]:
        assert most == 5
        if len(self.heard) + len(prompts) > self.may:
            raise KeyboardInterrupt
        self.heard += [prompt.split()[0] for prompt in prompts]
        return [Reply(prompt, too_long=prompt.startswith("000003")) for prompt in prompts]

    def finish(self) -> None:
        self.finished += 1

    def settle(self, worker: Worker) -> tuple[str, ...]:
        """The first suite's answers did not fit into memory."""
        return ("half as much",) if self.finished == 1 else ()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    place = Storage(LocalFileSystem(), str(tmp_path / "own"), "file:///own")
    write_cases(place, "suites/task.jsonl", CASES)
    return place


@pytest.fixture(autouse=True)
def _few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "ROUND", 3)
    monkeypatch.setattr(answering, "WRITE_SECONDS", 0.0)


def ask(storage: Storage, parrot: Parrot, worker: Worker | None = None, told: list[Told] | None = None) -> None:
    said = [] if told is None else told
    answer(Asking(parrot, "completion"), SOMEBODY, storage, worker or Worker(), said.append)  # type: ignore[arg-type]


def expected() -> tuple[Answered, ...]:
    return tuple(Answered(case.id, f"{case.id} {case.prompt}") for case in CASES)


def test_every_case_is_answered_in_the_order_of_the_suite(storage: Storage, tmp_path: Path) -> None:
    told: list[Told] = []
    parrot = Parrot()
    assert outstanding(storage, SOMEBODY) == SOMEBODY
    ask(storage, parrot, told=told)
    assert read_answers(storage, "prompt-short", QUESTIONS) == expected()
    assert outstanding(storage, SOMEBODY) is None
    lengths = [len(CASES[int(name)].prompt or "") for name in parrot.heard]
    assert lengths == sorted(lengths, reverse=True)
    assert [each.answered for each in told] == [0, 3, 6, 9, 12, 15, 18, 21, 23, 23, 23]
    assert str(told[1]) == "prompt-short, suite task: 3 of 23 answered"
    assert told[-1].warning == "half as much"
    assert told[-2].warning.startswith("suite task: 1 of 23 prompts leave no room for an answer: the model takes 100 tokens; prompt-short")
    assert [path.name for path in (tmp_path / "own" / "answers" / "prompt-short").iterdir() if path.is_file()] == ["task.jsonl"]
    assert storage.files("answers/prompt-short/parts/task") == []


def test_a_kill_costs_no_more_than_what_was_being_answered(storage: Storage) -> None:
    first, second = Parrot(may=10), Parrot()
    with pytest.raises(KeyboardInterrupt):
        ask(storage, first)
    assert len(first.heard) == 9
    assert read_answers(storage, "prompt-short", QUESTIONS) is None
    ask(storage, second)
    assert sorted([*first.heard, *second.heard]) == [case.id for case in CASES]
    assert read_answers(storage, "prompt-short", QUESTIONS) == expected()
    third = Parrot()
    ask(storage, third)
    assert third.heard == []


def test_workers_share_out_what_any_number_of_them_has_left(storage: Storage) -> None:
    first = Parrot(may=6)
    with pytest.raises(KeyboardInterrupt):
        ask(storage, first)
    together, parrots = Together(2), [Parrot(), Parrot()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: ask(storage, parrots[rank], together.worker(rank)), range(2)))
    assert {len(parrot.heard) for parrot in parrots} == {8, 9}
    assert sorted([*first.heard, *parrots[0].heard, *parrots[1].heard]) == [case.id for case in CASES]
    assert [parrot.finished for parrot in parrots] == [1, 1]
    assert read_answers(storage, "prompt-short", QUESTIONS) == expected()


def test_what_is_not_as_it_was_written_is_answered_again(storage: Storage, tmp_path: Path) -> None:
    first = Parrot(may=6)
    with pytest.raises(KeyboardInterrupt):
        ask(storage, first)
    part = next((tmp_path / "own" / "answers" / "prompt-short" / "parts" / "task").iterdir())
    part.write_text(part.read_text()[:-9])
    second = Parrot()
    ask(storage, second)
    assert len(second.heard) == 23 - 3
    assert read_answers(storage, "prompt-short", QUESTIONS) == expected()
    write_cases(storage, "suites/task.jsonl", CASES[:-1])
    assert read_answers(storage, "prompt-short", QUESTIONS) is None


def test_a_text_may_hold_what_ends_a_line_elsewhere(storage: Storage) -> None:
    odd = [Case("0", "a\u2028b\x85c\nd", prompt="\u2029")]
    write_cases(storage, "suites/task.jsonl", odd)
    assert read_cases(storage, "suites/task.jsonl") == odd
    ask(storage, Parrot())
    assert read_answers(storage, "prompt-short", QUESTIONS) == (Answered("0", "0 \u2029"),)


def test_a_suite_without_cases_is_answered(storage: Storage) -> None:
    write_cases(storage, "suites/task.jsonl", [])
    ask(storage, Parrot())
    assert read_answers(storage, "prompt-short", QUESTIONS) == ()


def test_a_candidate_travels_as_json() -> None:
    candidate = Candidate(
        "model-other", (QUESTIONS, Questions("more", cases="suites/few-more.jsonl")), model={"source": "hf://a/b"}, whole=True
    )
    assert Candidate.of_json(json.loads(json.dumps(candidate.to_json()))) == candidate
    assert [each.file for each in candidate.questions] == ["suites/task.jsonl", "suites/few-more.jsonl"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], ModelFiles]:
    """A job that has trained: its folder, its manifest, its model."""
    root = tmp_path_factory.mktemp("trained")
    folder = make_tiny_llama(root / "model", width=16)
    manifest = manifest_with(folder, {"lora": {"rank": 2}}, maxSequenceLength=64)
    job = parse_job(manifest, local=True)
    files = fetch_model(job.spec.model, Mounts(folder, local=True), folder / "cache", weights=True)
    task = Task(job, files.base, CONFIG, storage_in(root / "own"))
    assert train(task, Models(load_model(files, job, CPU)), DATA, Worker(), Listener())
    return root, manifest, files


def candidates_of(trained: tuple[Path, dict[str, Any], ModelFiles], fetched: list[str], worker: Worker | None = None) -> Candidates:
    root, manifest, files = trained

    def fetch(source: ModelSource, revision: str | None) -> ModelFiles:
        fetched.append(source.source)
        return fetch_model(source, Mounts(root, local=True), root / "cache", weights=True, revision=revision)

    return Candidates(parse_job(manifest, local=True), files.revision, CONFIG, storage_in(root / "own"), fetch, worker or Worker())


def test_the_untuned_model_and_each_checkpoint_are_asked_as_they_were(trained: tuple[Path, dict[str, Any], ModelFiles]) -> None:
    """The validation split's texts as cases: what is measured of them is what the training measured, before and after."""
    root, _, files = trained
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    own = storage_in(root / "own")
    texts = [tokenizer.decode(DATA.validation.example(index)[0]) for index in range(len(DATA.validation))]
    cases = [Case(str(number), text[3:], prompt=text[:3]) for number, text in enumerate(texts)]
    write_cases(own, "suites/held.jsonl", cases)
    fetched: list[str] = []
    candidates = candidates_of(trained, fetched)
    questions = Questions("held", max_new_tokens=4)
    steps = [int(path.name.removeprefix("step-")) for path in sorted((root / "own" / "checkpoints").iterdir())]
    everybody = [Candidate("baseline", (questions,)), *(Candidate(f"step-{step}", (questions,), step=step) for step in steps)]
    found = {}
    for candidate in everybody:
        answer(candidates.asking(candidate), candidate, own, Worker(), lambda told: None)
        answered = read_answers(own, candidate.name, questions)
        assert answered is not None
        found[candidate.name] = answered
    assert len(fetched) == 2
    for number, text in enumerate(texts):  # the letters after the third, and the end token
        assert {each[number].labels for each in found.values()} == {len(text) - 3 + 1}
    manifest = json.loads((root / "own" / "result" / "manifest.json").read_text())
    sums = {name: (sum(each.loss for each in answers), sum(each.labels for each in answers)) for name, answers in found.items()}
    ends = {name: _ends(trained, candidates, candidate, texts) for name, candidate in zip(found, everybody, strict=True)}
    for name, figure in (("baseline", manifest["before"]["validation"]), (f"step-{steps[-1]}", manifest["after"]["validation"])):
        loss, labels = sums[name]
        assert (loss - ends[name]) / (labels - len(texts)) == pytest.approx(figure, abs=1e-4)
    assert sums[f"step-{steps[-1]}"][0] < sums[f"step-{steps[0]}"][0] < sums["baseline"][0]


def _ends(trained: Any, candidates: Candidates, candidate: Candidate, texts: Sequence[str]) -> float:
    """The loss of the end tokens, which the training's own rows do not have: whole rows less rows without."""
    asking = candidates.asking(candidate)
    model = asking.speaker.voice.model
    total = 0.0
    for text in texts:
        ids = torch.tensor([[*asking.speaker.prompt(Case("0", "", prompt=text)), 2]])
        model.module.eval()
        model.transformer.set_attn_implementation("sdpa")
        with torch.no_grad():
            total -= float(model.transformer(ids).logits[0, -2].log_softmax(-1)[2])
        model.transformer.set_attn_implementation("finetune_flat")
    return total


def test_a_checkpoint_that_is_not_there_is_said(trained: tuple[Path, dict[str, Any], ModelFiles]) -> None:
    with pytest.raises(JobError) as caught:
        candidates_of(trained, []).asking(Candidate("step-77", step=77))
    assert caught.value.reason == Reason.CHECKPOINT_CORRUPTED


def test_another_model_is_asked_with_its_own_weights(trained: tuple[Path, dict[str, Any], ModelFiles], tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", width=24, seed=3)
    asking = candidates_of(trained, []).asking(Candidate("model-other", model={"source": f"file://{other}"}))
    assert asking.speaker.voice.model.transformer.config.hidden_size == 24
    assert not asking.speaker.voice.model.trained_parameters()
