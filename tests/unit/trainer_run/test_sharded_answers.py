"""Two workers of which each holds a part of every layer answer as one that holds all, whatever share of the cases each has."""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from fsspec.implementations.local import LocalFileSystem
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import CONFIG, DATA, Listener, manifest_with

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import ModelSource, parse_job
from finetune_trainer import answering
from finetune_trainer.answering import Candidate, Questions, answer, read_answers, write_cases
from finetune_trainer.candidates import Candidates
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.failures import as_job_error, is_final
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.methods import method_for
from finetune_trainer.model import CausalModel, load_model
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.sharding import decoder_layers
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

QUESTIONS = Questions("task", max_new_tokens=6)
CASES = [Case(str(number), "yes" * (1 + number % 3), prompt="ab" * (1 + number)) for number in range(7)]
ASKED = (
    Candidate("baseline", (QUESTIONS,)),
    Candidate("step-3", (QUESTIONS,), step=3),
    Candidate("published", (QUESTIONS,), artifact="adapter"),
)
"""The last one is what a measuring run asks."""
METHODS: dict[str, dict[str, Any]] = {"lora": {"lora": {"rank": 2}}, "prompt": {"promptTuning": {"numVirtualTokens": 3}}}
"""The second one computes with the embeddings itself."""


def place(root: Path, name: str) -> Storage:
    return Storage(LocalFileSystem(), str(root / name), f"file://{root}/{name}")


def ask(root: Path, manifest: dict[str, Any], name: str, worker: Worker, short: int = 0) -> bool:
    """Have the untuned model, a checkpoint and the published adapter answer. Returns whether all were sharded.

    `short` is the forward pass, counted from 1, in the midst of which the untuned model finds no memory.
    """
    job = parse_job(manifest, local=True)
    mounts = Mounts(root, local=True)

    def fetch(source: ModelSource, revision: str | None) -> ModelFiles:
        return fetch_model(source, mounts, root / "cache", weights=True, revision=revision)

    answering.ROUND = 2
    revision = fetch(job.spec.model, None).revision
    candidates = Candidates(job, revision, CONFIG, place(root, name), fetch, worker, place(root, name))
    sharded = []
    for candidate in ASKED:
        asking = candidates.asking(candidate)
        if candidate.step is None and short:
            run_short(asking.speaker.voice.model, short)
        sharded.append(asking.speaker.voice.model.sharded)
        answer(asking, candidate, place(root, name), worker, lambda told: None)
    return all(sharded)


def run_short(model: CausalModel, at: int) -> None:
    """Have a model's first layer find no memory at one of its forward passes."""
    calls = itertools.count(1)

    def refuse(*_: object) -> None:
        if next(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")

    decoder_layers(model.transformer)[0].register_forward_pre_hook(refuse)


def _work(rank: int, root: Path, manifests: dict[str, dict[str, Any]], short: int = 0) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root / 'rendezvous'}", rank=rank, world_size=2)
    worker = Worker(rank=rank, world=2, all_reduce=dist.all_reduce)
    try:
        assert all(ask(root, manifest, name, worker, short if rank else 0) for name, manifest in manifests.items())
    except Exception as error:
        (root / f"ended-{rank}.json").write_text(json.dumps([as_job_error(error).reason, is_final(error)]))
        raise
    dist.destroy_process_group()


def answers(root: Path, name: str) -> dict[str, tuple[Answered, ...]]:
    found = {each.name: read_answers(place(root, name), each.name, QUESTIONS) for each in ASKED}
    assert all(each is not None for each in found.values())
    return found  # type: ignore[return-value]


def assert_same(found: tuple[Answered, ...], expected: tuple[Answered, ...]) -> None:
    assert [each.text for each in found] == [each.text for each in expected]
    assert [(each.id, each.labels, each.correct) for each in found] == [(each.id, each.labels, each.correct) for each in expected]
    torch.testing.assert_close(torch.tensor([each.loss for each in found]), torch.tensor([each.loss for each in expected]))


@dataclass(frozen=True)
class Asked:
    """Jobs that have trained, by name, and what one worker alone has answered for each."""

    root: Path
    manifests: dict[str, dict[str, Any]]
    alone: dict[str, dict[str, tuple[Answered, ...]]]

    def together(self, *names: str, short: int = 0) -> dict[str, dict[str, tuple[Answered, ...]]]:
        """What two workers answer."""
        for left in ("rendezvous", "ended-1.json"):
            (self.root / left).unlink(missing_ok=True)
        processes.spawn(_work, (self.root, {name: self.manifests[name] for name in names}, short), nprocs=2)
        return {name: answers(self.root, name) for name in names}


def asked_alone(tmp_path: Path, *names: str) -> Asked:
    """Jobs of these methods."""
    make_tiny_llama(tmp_path / "model", width=16)
    manifests, alone = {}, {}
    for name in names:
        manifest = manifest_with(tmp_path / "model", METHODS[name], learningRate=0.05)
        job = parse_job(manifest, local=True)
        files = fetch_model(job.spec.model, Mounts(tmp_path, local=True), tmp_path / "cache", weights=True)
        task = Task(job, files.base, CONFIG, place(tmp_path, name))
        model = load_model(files, job, torch.device("cpu"))
        train(task, Models(model), DATA, Worker(), Listener(stop_after=3))
        (tmp_path / name / "adapter").mkdir()
        method_for(job.spec.method).export(model.module, tmp_path / name / "adapter", files.base, "adapter")
        write_cases(place(tmp_path, name), QUESTIONS.file, CASES)
        assert not ask(tmp_path, manifest, name, Worker())
        alone[name] = answers(tmp_path, name)
        (tmp_path / name / "answers").rename(tmp_path / f"{name}-alone")
        manifest["spec"]["compute"] = {"strategy": "fsdp"}
        manifests[name] = json.loads(json.dumps(manifest))
    os.environ["OMP_NUM_THREADS"] = "1"
    return Asked(tmp_path, manifests, alone)


def test_workers_that_share_every_layer_answer_as_one_alone(tmp_path: Path) -> None:
    asked = asked_alone(tmp_path, *METHODS)
    for name, together in asked.together(*METHODS).items():
        alone = asked.alone[name]
        assert alone["baseline"] != alone["step-3"]
        assert_same(alone["published"], alone["step-3"])
        for candidate, expected in alone.items():
            assert_same(together[candidate], expected)


def test_where_memory_is_short_they_begin_anew_with_half(tmp_path: Path) -> None:
    """The second worker reads two references in its seventh pass (six have shown that keys and values can be kept), and two prompts in the
    next; with references one by one, the prompts come in the ninth. Both times the first one waits for its layers."""
    asked, root = asked_alone(tmp_path, "lora"), tmp_path / "lora"
    for at, file in ((7, "references-at-once.json"), (9, "answers-at-once.json")):
        with pytest.raises(processes.ProcessRaisedException):
            asked.together("lora", short=at)
        assert json.loads((asked.root / "ended-1.json").read_text()) == [Reason.WORKERS_LOST, False]
        assert (root / file).exists()
    for candidate, found in asked.together("lora")["lora"].items():
        assert_same(found, asked.alone["lora"][candidate])
