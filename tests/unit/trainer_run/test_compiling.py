"""torch.compile of the layers on this machine's CPU: the same losses, and no failure where it cannot be done."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import CONFIG, CPU, DATA, Listener, Together, job_with, manifest_with, result, storage_in

from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.compiling import compile_layers
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.model import CausalModel, load_model
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.placement import placed
from finetune_trainer.remedy import compiled
from finetune_trainer.sharding import decoder_layers
from finetune_trainer.sources import Mounts
from finetune_trainer.worker import Worker

COMPILE = torch.compile
FEW = replace(DATA, train=DATA.train.take(range(8)), validation=DATA.validation.take(range(2)), test=None)  # type: ignore[union-attr]
"""Two steps of two micro-batches, each of other lengths than those before it; of the rest one."""
WITHOUT = "the model is trained without torch.compile: "


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return made_in(tmp_path_factory.mktemp("model"), layers=2)


def made_in(folder: Path, layers: int) -> ModelFiles:
    make_tiny_llama(folder, width=16, layers=layers)
    return fetch_model(job_with(folder).spec.model, Mounts(folder, local=True), folder / "cache", weights=True)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """No test sees what another has compiled."""
    yield
    torch._dynamo.reset()


def job_of(files: ModelFiles, wanted: str = "always") -> FineTuneJob:
    method = {"lora": {"rank": 2, "dropout": 0.0, "targetModules": ["q_proj", "down_proj"]}}  # few, for there is less to compile
    return parse_job(manifest_with(files.folder, method, epochs=1, packing=False, compile=wanted), local=True)


def trained(files: ModelFiles, folder: Path, model: CausalModel, listener: Listener, worker: Worker | None = None) -> bool:
    task = Task(job_of(files), files.base, CONFIG, storage_in(folder))
    return train(task, Models(model), FEW, worker or Worker(), listener)


@pytest.fixture(scope="module")
def plain(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it comes to without a compiler."""
    return trained_plainly(files, tmp_path_factory.mktemp("plain"))


def trained_plainly(files: ModelFiles, folder: Path) -> Path:
    model, warnings = placed(files, job_of(files, "never"), Worker())
    assert warnings == ()
    assert trained(files, folder, model, Listener())
    return folder


def same(folder: Path, other: Path) -> None:
    (figures, weights), (others, other_weights) = result(folder), result(other)
    assert figures == pytest.approx(others, abs=1e-4)
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], atol=1e-4, rtol=0)


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """The compiler that there is, without what makes only large models faster: more processes, and vectors, which it tries out first."""
    with torch._inductor.config.patch({"compile_threads": 1, "cpp.vec_isa_ok": False}):
        yield


@pytest.mark.timeout(900)  # the compiler of C++ is a process of its own, and slow beside others
@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_model_comes_to_the_same_end(tmp_path: Path) -> None:
    """Every micro-batch has other lengths: few compilations are for all of them."""
    files = made_in(tmp_path / "model", layers=1)
    model, warnings = placed(files, job_of(files), Worker())
    assert warnings == ()
    listener = Listener()
    assert trained(files, tmp_path / "compiled", model, listener)
    assert listener.told[-1].warnings == ()
    assert all(map(compiled, decoder_layers(model.transformer)))
    same(tmp_path / "compiled", trained_plainly(files, tmp_path / "plain"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch._dynamo.utils.counters["recompile_limit"] == {}


def test_without_a_compiler_it_is_trained_as_it_is(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    job = job_of(files)
    model = load_model(files, job, CPU)
    (warning,) = compile_layers(model, job.spec, Worker())
    assert warning.startswith(f"{WITHOUT}No working C++ compiler found")
    assert not any("forward" in vars(layer) for layer in decoder_layers(model.transformer))


def test_where_nothing_can_be_compiled_it_is_trained_as_it_is(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.compile itself refuses on a version of Python that it does not know."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("torch.compile is not supported here")

    monkeypatch.setattr(torch, "compile", refuse)
    job = job_of(files)
    model = load_model(files, job, CPU)
    assert compile_layers(model, job.spec, Worker()) == (f"{WITHOUT}torch.compile is not supported here",)
    assert not any("forward" in vars(layer) for layer in decoder_layers(model.transformer))


def test_a_compiler_that_fails_later_ends_nothing(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    """It makes what is as slow as before, and fails at the first graph after those of the first pass. That is told once."""
    broken = False

    def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if broken:
            raise RuntimeError("no kernel for this shape")
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda call, **named: COMPILE(call, backend=compiler, **named))
    model, warnings = placed(files, job_of(files), Worker())
    assert warnings == ()
    assert all(map(compiled, decoder_layers(model.transformer)))
    broken, listener = True, Listener()
    assert trained(files, tmp_path, model, listener)
    assert listener.told[-1].warnings == (f"{WITHOUT}no kernel for this shape",)
    assert not any(map(compiled, decoder_layers(model.transformer)))
    same(tmp_path, plain)


def nothing() -> None:
    """Done where nothing fails."""


def as_if_compiled(call: Callable[..., Any], forwards: Callable[[], None] = nothing, backwards: Callable[[], None] = nothing) -> Any:
    """A layer's forward with torch.compile's mark. What is given is called in each pass of the training."""

    class Backwards(torch.autograd.Function):
        """Where torch.compile has made the backward pass, autograd calls it so."""

        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.view_as(hidden)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            backwards()
            return gradient

    def forward(*arguments: Any, **named: Any) -> Any:
        if not call.__self__.training:  # type: ignore[attr-defined]
            return call(*arguments, **named)
        forwards()
        return Backwards.apply(call(*arguments, **named))  # type: ignore[no-untyped-call]

    forward._torchdynamo_orig_callable = call  # type: ignore[attr-defined]
    return forward


@pytest.mark.parametrize("where", ["forwards", "backwards"])
@pytest.mark.parametrize("at", [1, 2, 3], ids=["at once", "in the second micro-batch", "in the second step"])
def test_what_was_compiled_and_fails_when_it_runs_ends_nothing(files: ModelFiles, tmp_path: Path, plain: Path, where: str, at: int) -> None:
    """Gradients are there of the micro-batch before, or backwards of the layer above: they count once."""
    model, listener = load_model(files, job_of(files), CPU), Listener()
    passes, left = 0, 0.0

    def fail() -> None:
        nonlocal passes, left
        passes += 1
        if passes == at:
            left = sum(float(parameter.grad.abs().sum()) for parameter in model.trained_parameters() if parameter.grad is not None)
            raise RuntimeError("the kernel cannot be launched")

    first, second = decoder_layers(model.transformer)
    first.forward, second.forward = as_if_compiled(first.forward, **{where: fail}), as_if_compiled(second.forward)
    assert trained(files, tmp_path, model, listener)
    assert passes == at
    assert (left > 0) == (where == "backwards" or at == 2)
    assert listener.told[-1].warnings == (f"{WITHOUT}the kernel cannot be launched",)
    assert not any(map(compiled, (first, second)))
    same(tmp_path, plain)


@pytest.mark.parametrize("first", [True, False], ids=["at first", "in training"])
def test_what_fails_without_a_compiler_too_is_said_as_it_is(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Nothing is said of torch.compile, which was not at fault."""
    job, listener = job_of(files), Listener()
    model = load_model(files, job, CPU)
    layer, _ = decoder_layers(model.transformer)
    own: Callable[..., Any] = type(layer).forward

    def broken(self: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
        if first or self.training:
            raise KeyError("a defect of ours")
        return own(self, *arguments, **named)

    monkeypatch.setattr(type(layer), "forward", broken)
    monkeypatch.setattr(torch, "compile", lambda call, **_: as_if_compiled(call))
    if first:
        with pytest.raises(KeyError, match="a defect of ours"):
            compile_layers(model, job.spec, Worker())
    else:
        model.module.eval()
        assert compile_layers(model, job.spec, Worker()) == ()
        assert compiled(layer)
        with pytest.raises(KeyError, match="a defect of ours"):
            trained(files, tmp_path, model, listener)
    assert not compiled(layer)
    assert [told.warnings for told in listener.told if told.warnings] == []


def test_one_of_two_workers_cannot_compile(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does; the one that leads hears of it, and says so."""
    job, together = job_of(files), Together(2)
    models = [load_model(files, job, CPU) for _ in range(2)]

    def compile_one(call: Callable[..., Any], **_: object) -> Callable[..., Any]:
        if call.__self__ in decoder_layers(models[1].transformer):  # type: ignore[attr-defined]
            raise RuntimeError("no space left on device")
        return as_if_compiled(call)

    monkeypatch.setattr(torch, "compile", compile_one)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(compile_layers, models[rank], job.spec, together.worker(rank)) for rank in range(2)]
        assert [one.result() for one in both] == [(f"{WITHOUT}it failed on another worker",), (f"{WITHOUT}no space left on device",)]
    assert not any(compiled(layer) for model in models for layer in decoder_layers(model.transformer))


def test_one_of_two_workers_falls_back(files: ModelFiles, tmp_path: Path, plain: Path) -> None:
    """The other one hears of it with the gradients: all go on without, and the one that leads says so."""
    together, listener = Together(2), Listener()
    models = [load_model(files, job_of(files), CPU) for _ in range(2)]

    def fail() -> None:
        raise RuntimeError("no kernel for this shape")

    for model, forwards in zip(models, (nothing, fail), strict=True):
        for layer in decoder_layers(model.transformer):
            layer.forward = as_if_compiled(layer.forward, forwards)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(trained, files, tmp_path, models[rank], listener, together.worker(rank)) for rank in range(2)]
        assert [one.result() for one in both] == [True, True]
    assert listener.told[-1].warnings == (f"{WITHOUT}it failed on another worker",)
    assert not any(compiled(layer) for model in models for layer in decoder_layers(model.transformer))
    same(tmp_path, plain)


def test_auto_does_not_compile_on_a_cpu(files: ModelFiles) -> None:
    job = job_with(files.folder)
    model = load_model(files, job, CPU)
    assert compile_layers(model, job.spec, Worker()) == ()
    assert not any("forward" in vars(layer) for layer in decoder_layers(model.transformer))
