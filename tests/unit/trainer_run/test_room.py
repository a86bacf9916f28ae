"""What a worker computes at once: all that takes room is counted, padding and virtual tokens too, and all go by the one with the least."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import CONFIG, CPU, DATA, Listener, Together, manifest_with, storage_in

from finetune_api.estimate import AUTO_TOKENS
from finetune_api.v1alpha1 import parse_job
from finetune_trainer.activations import with_activations
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model import CausalModel, load_model
from finetune_trainer.model_files import fetch_model
from finetune_trainer.sources import Mounts
from finetune_trainer.worker import Worker

VIRTUAL = 9


@pytest.mark.parametrize("method", ["lora", "promptTuning", "prefixTuning"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_no_micro_batch_of_several_rows_takes_more_room_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, layout: str
) -> None:
    """Room for 64 positions. Examples are of 5 to 12 tokens, so each one takes up to 21 with a prompt."""
    folder = make_tiny_llama(tmp_path / "model", width=16, layers=1)
    method_spec: dict[str, Any] = {method: {} if method == "lora" else {"numVirtualTokens": VIRTUAL}}
    settings: dict[str, Any] = {"microBatchSize": "auto", "globalBatchSize": 16, "epochs": 1, "packing": False}
    job = parse_job(manifest_with(folder, method_spec, **settings), local=True)
    files = fetch_model(job.spec.model, Mounts(folder, local=True), tmp_path / "cache", weights=True)
    model = load_model(files, job, CPU)
    if layout == "padded":
        model.transformer.set_attn_implementation("sdpa")
        model = replace(model, layout="padded")
    taken: list[tuple[int, int]] = []
    run = CausalModel.run

    def seen(self: CausalModel, batch: Any, **wanted: Any) -> Any:
        virtual = 0 if method == "lora" else VIRTUAL
        longest = batch.input_ids.shape[1] + virtual
        examples = len(batch.document_lengths)
        taken.append((examples, examples * longest if layout == "padded" else batch.tokens + examples * virtual))
        return run(self, batch, **wanted)

    monkeypatch.setattr(CausalModel, "run", seen)
    monkeypatch.setitem(AUTO_TOKENS, "cpu", 64)
    task = Task(job, files.base, CONFIG, storage_in(tmp_path / "out"))
    assert train(task, Models(model), DATA, Worker(), Listener())
    assert max(positions for _, positions in taken) <= 64
    assert max(examples for examples, _ in taken) >= 3


def test_all_workers_go_by_the_one_with_the_least_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that hold parts of a model must cut their rows into equally many pieces, and recompute the same."""
    folder = make_tiny_llama(tmp_path / "model", width=16, layers=1)
    job = parse_job(manifest_with(folder, {"lora": {}}, microBatchSize="auto", compile="never"), local=True)
    files = fetch_model(job.spec.model, Mounts(folder, local=True), tmp_path / "cache", weights=True)
    free = {torch.device("cuda", 0): 3 * 2**20, torch.device("cuda", 1): 2**20}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 2**30))
    models = [replace(load_model(files, job, CPU), device=device) for device in free]
    together = Together(2)

    def ready(rank: int) -> CausalModel:
        return with_activations(models[rank], job, together.worker(rank))[0]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ready, range(2))
    alone, _ = with_activations(models[0], job, Worker())
    assert first.auto_tokens == second.auto_tokens
    assert first.auto_tokens is not None
    assert alone.auto_tokens is not None
    assert first.auto_tokens < alone.auto_tokens
