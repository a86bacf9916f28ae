"""torch.compile of the layers on this machine's CPU: the same losses, and no failure where it cannot be done."""

from pathlib import Path

import pytest
import torch
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import CONFIG, CPU, DATA, Listener, job_with, result, storage_in

from finetune_trainer.compiling import compile_layers
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model import load_model
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.placement import placed
from finetune_trainer.sources import Mounts
from finetune_trainer.worker import Worker


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = make_tiny_llama(tmp_path_factory.mktemp("model"), width=16, layers=1)
    return fetch_model(job_with(folder).spec.model, Mounts(folder, local=True), folder / "cache", weights=True)


@pytest.mark.timeout(900)  # the compiler of C++ is a process of its own, and slow beside others
def test_a_compiled_model_comes_to_the_same_end(files: ModelFiles, tmp_path: Path) -> None:
    """Every micro-batch has other lengths: few compilations are for all of them."""
    ends = []
    for compiled in ("never", "always"):
        job = job_with(files.folder, dropout=0.0, epochs=1, compile=compiled)
        model, warnings = placed(files, job, Worker())
        assert warnings == ()
        assert train(Task(job, files.base, CONFIG, storage_in(tmp_path / compiled)), Models(model), DATA, Worker(), Listener())
        ends.append(result(tmp_path / compiled)[0])
    assert ends[1] == pytest.approx(ends[0], abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch._dynamo.utils.counters["recompile_limit"] == {}


def test_without_a_compiler_it_is_trained_as_it_is(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    job = job_with(files.folder, compile="always")
    model = load_model(files, job, CPU)
    (warning,) = compile_layers(model, job.spec)
    assert warning.startswith("the model is trained without torch.compile: ")
    assert model.run is not None
    assert all("forward" not in vars(layer) for layer in model.transformer.get_decoder().layers)


def test_auto_does_not_compile_on_a_cpu(files: ModelFiles) -> None:
    job = job_with(files.folder)
    model = load_model(files, job, CPU)
    assert compile_layers(model, job.spec) == ()
    assert all("forward" not in vars(layer) for layer in model.transformer.get_decoder().layers)
