"""Distillation through the whole loop: students that end better than on labels alone, and what is trained, saved, resumed and published.

The task: triples of a first symbol, a second one, and the answer that a random table gives. Of the student's labels more than half are
wrong; the teacher has learned from right ones. What is measured are the right answers for every pair of symbols.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from tiny_models import job_manifest
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.attention import choose_layout
from finetune_trainer.data.examples import Examples, Prepared, join
from finetune_trainer.data.tensors import collate
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model import CausalModel, load_model
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.objectives import Sft
from finetune_trainer.objectives.distillation.feature import new_projection
from finetune_trainer.objectives.distillation.teacher_cache import is_complete
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage
from finetune_trainer.teacher import load_teacher
from finetune_trainer.worker import Worker

torch.set_num_threads(1)
CPU = torch.device("cpu")
SYMBOLS = 8
TRIPLES = 4
"""In each example: so there are several labels among whose hidden states there are relations."""
WRONG = 0.6


class Silent:
    stop_requested = regroup_requested = False

    def post(self, progress: Any) -> None:
        """Nobody is told."""


class StopsAfter(Silent):
    """Asks for a stop after a step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @property
    def stop_requested(self) -> bool:  # type: ignore[override]
        self.steps -= 1
        return self.steps <= 0


def triples(pairs: np.ndarray[Any, Any], answers: np.ndarray[Any, Any]) -> Examples:
    """Examples of TRIPLES triples each, the answers labelled; the three kinds of symbols are different tokens."""
    rows = np.stack([pairs[:, 0], SYMBOLS + pairs[:, 1], 2 * SYMBOLS + answers], axis=1).astype(np.int32)
    labelled = np.tile(np.array([False, False, True]), TRIPLES)
    return join([(part.reshape(-1), labelled) for part in rows.reshape(-1, TRIPLES, 3)])


def make_data() -> tuple[Prepared, Examples]:
    """What the student has, its held-out part right; and right labels for the teacher."""
    generator = np.random.default_rng(0)
    table = generator.integers(0, SYMBOLS, (SYMBOLS, SYMBOLS))
    every = np.stack(np.meshgrid(np.arange(SYMBOLS), np.arange(SYMBOLS)), axis=-1).reshape(-1, 2)
    pairs = np.concatenate([generator.permutation(every) for _ in range(6)])
    right = table[pairs[:, 0], pairs[:, 1]]
    wrong = np.where(generator.random(len(pairs)) < WRONG, generator.integers(0, SYMBOLS, len(pairs)), right)
    held_out = triples(every, table[every[:, 0], every[:, 1]])
    more = np.concatenate([generator.permutation(every) for _ in range(300)])
    return Prepared(triples(pairs, wrong), held_out, None, 0, "sha256:1"), triples(more, table[more[:, 0], more[:, 1]])


DATA, RIGHT = make_data()


def make_model(folder: Path, *, width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 3 * SYMBOLS, "initializer_range": 0.1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, max_position_embeddings=64))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained student, and a wider teacher that has learned the table."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "student", width=24, seed=2)
    model = make_model(folder / "teacher", width=32, seed=1)
    causal = CausalModel(model, model, choose_layout(model), True, torch.float32, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for start in range(0, len(RIGHT), 16):
        batch = collate(RIGHT, [(index,) for index in range(start, start + 16)], "flat")
        optimizer.zero_grad()
        (Sft().loss(causal, batch).total / batch.labels).backward()
        optimizer.step()
    model.save_pretrained(folder / "teacher")
    assert held_out_loss(causal) < 0.05
    return folder


def held_out_loss(model: CausalModel) -> float:
    batch = collate(DATA.validation, [(index,) for index in range(len(DATA.validation))], "flat")
    with torch.no_grad():
        return float(Sft().loss(model, batch).total) / batch.labels


def job_of(folder: Path, method: dict[str, Any], forms: dict[str, Any] | None, **training: Any) -> FineTuneJob:
    given = {"epochs": 14, "globalBatchSize": 4, "maxSequenceLength": 4 * 3 * TRIPLES, "learningRate": 0.01, "precision": "float32"}
    objective: dict[str, Any] = {"sft": {}}
    if forms is not None:
        objective = {"distillation": {"teacher": {"source": f"file://{folder}/teacher"}, "labelWeight": 1, **forms}}
    model = {"source": f"file://{folder}/student"}
    checkpoint = {"everySteps": 1000}
    manifest = job_manifest(model=model, method=method, objective=objective, training=given | training, checkpoint=checkpoint)
    return parse_job(manifest, local=True)


def files_of(folder: Path, job: FineTuneJob, name: str) -> ModelFiles:
    source = job.spec.model.model_copy(update={"source": f"file://{folder}/{name}"})
    return fetch_model(source, Mounts(folder, local=True), folder / "cache", weights=True)


def run(
    folder: Path, out: Path, forms: dict[str, Any] | None, listener: Any = None, kept: Storage | None = None, **fields: Any
) -> float | None:
    """The held-out loss at the end of a job; None where it was stopped before."""
    job = job_of(folder, fields.pop("method", {"full": {}}), forms, **fields)
    student = files_of(folder, job, "student")
    teacher = load_teacher(files_of(folder, job, "teacher"), job, CPU) if forms is not None else None
    storage = Storage(LocalFileSystem(), str(out), f"file://{out}")
    models = Models(load_model(student, job, CPU), teacher, kept)
    if not train(Task(job, student.base, {"job": "1"}, storage), models, DATA, Worker(), listener or Silent()):
        return None
    return float(json.loads((out / "result" / "manifest.json").read_text())["after"]["validation"])


@pytest.fixture(scope="module")
def labels_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    loss = run(folder, tmp_path_factory.mktemp("labels"), None)
    assert loss is not None
    return loss


FORMS: dict[str, dict[str, Any]] = {
    "response": {"response": {"weight": 2}},
    "response, three tokens kept": {"response": {"weight": 2, "topK": 3}},
    "feature": {"feature": {"weight": 10}},
    "relation between tokens": {"relation": {"weight": 20}},
    "relation between examples": {"relation": {"weight": 10, "between": ["tokens", "examples"]}},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_student_of_a_teacher_ends_better_than_on_labels_alone(folder: Path, tmp_path: Path, labels_alone: float, name: str) -> None:
    kept = Storage(LocalFileSystem(), str(tmp_path / "kept"), "file:///kept") if "kept" in name else None
    loss = run(folder, tmp_path / "out", FORMS[name], kept=kept)
    assert loss is not None
    assert loss < 0.9 * labels_alone
    assert kept is None or is_complete(kept)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.rglob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_projections_are_trained_saved_and_gone_on_from_but_not_published(folder: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"method": {"lora": {"rank": 2}}, "epochs": 1}
    undisturbed = run(folder, tmp_path / "one", FORMS["feature"], **fields)
    assert run(folder, tmp_path / "two", FORMS["feature"], StopsAfter(3), **fields) is None
    (saved,) = (tmp_path / "two" / "checkpoints").glob("step-*")
    name = "objective.feature.0.projection"
    before = new_projection(24, 32, 42, 0, CPU)
    projections = [tensor for key, tensor in tensors_in(saved).items() if key == name]
    assert [tuple(tensor.shape) for tensor in projections] == [(32, 24)]
    assert not torch.equal(projections[0], before)
    assert run(folder, tmp_path / "two", FORMS["feature"], **fields) == undisturbed
    ends = [tensors_in(max((tmp_path / each / "checkpoints").glob("step-*"))) for each in ("one", "two")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())
    published = tensors_in(tmp_path / "one" / "result")
    assert published
    assert not any("objective" in key or "projection" in key for key in published)


def test_a_second_job_finds_what_the_first_has_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one's teacher would fail if it were run."""
    kept = Storage(LocalFileSystem(), str(tmp_path / "kept"), "file:///kept")
    forms = FORMS["response, three tokens kept"]
    first = run(folder, tmp_path / "one", forms, kept=kept, epochs=1)
    original = CausalModel.run

    def of_the_student_alone(model: CausalModel, *arguments: Any, **named: Any) -> Any:
        assert model.tuned
        return original(model, *arguments, **named)

    monkeypatch.setattr(CausalModel, "run", of_the_student_alone)
    assert run(folder, tmp_path / "two", forms, kept=kept, epochs=1) == first
