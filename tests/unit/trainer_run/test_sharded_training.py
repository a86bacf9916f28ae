"""Models of which each worker holds a part, in processes joined by gloo: the same losses, and checkpoints for any number of workers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.sharded import Run, start
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import manifest_with

SETTINGS: dict[str, Any] = {"globalBatchSize": 4, "microBatchSize": 1, "packing": False, "epochs": 1, "precision": "float32"}
"""30 examples: 8 steps of four rows, the last one of two, so that with three workers one is idle."""
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output layer is its embeddings, which must stay one tensor."""
    return make_tiny_llama(tmp_path_factory.mktemp("model"), width=16, tied=True)


def run(
    model: Path, folder: Path, world: int, *, sharded: bool, method: str = "full", **more: Any
) -> tuple[dict[int, float], dict[int, float]]:
    methods: dict[str, Any] = {"full": {"full": {}}, "lora": {"lora": {"rank": 2, "dropout": 0.0}}}
    manifest = manifest_with(model, method=methods[method], **SETTINGS)
    if sharded:
        manifest["spec"]["compute"] = {"strategy": "fsdp"}
    return start(Run(manifest, model, folder, world, **more))


def result(folder: Path, method: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    manifest = json.loads((folder / "result" / "manifest.json").read_text())
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    return manifest["before"] | {f"{split} after": loss for split, loss in manifest["after"].items()}, load_file(folder / "result" / name)


Alone = tuple[Path, dict[int, float], dict[int, float]]
"""What one process without any sharding comes to: its folder, the losses, the norms of the gradients."""


def alone(model: Path, folder: Path, method: str) -> Alone:
    return (folder, *run(model, folder, 1, sharded=False, method=method))


@pytest.fixture(scope="module")
def full(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return alone(model, tmp_path_factory.mktemp("full"), "full")


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return alone(model, tmp_path_factory.mktemp("lora"), "lora")


def same_end(folder: Path, other: Path, method: str) -> None:
    (figures, weights), (others, other_weights) = result(folder, method), result(other, method)
    assert figures == pytest.approx(others, abs=TOLERANCE)
    assert weights.keys() == other_weights.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], atol=TOLERANCE, rtol=1e-3)


@pytest.mark.parametrize(("method", "world"), [("full", 3), ("lora", 2)])
def test_each_worker_holds_a_part_and_all_is_as_in_one_process(
    model: Path, tmp_path: Path, request: pytest.FixtureRequest, method: str, world: int
) -> None:
    folder, losses, norms = request.getfixturevalue(method)
    own_losses, own_norms = run(model, tmp_path, world, sharded=True, method=method)
    assert own_losses == pytest.approx(losses, abs=TOLERANCE)
    assert own_norms == pytest.approx(norms, abs=TOLERANCE)
    same_end(tmp_path, folder, method)
    saved = sorted(path.name for path in (tmp_path / "checkpoints" / "step-00000008").glob("model*"))
    assert saved == [f"model-{rank:05d}-of-{world:05d}.safetensors" for rank in range(1, world + 1)]


def test_weights_that_differ_are_not_tied_whatever_the_configuration_says(tmp_path: Path) -> None:
    """The worker with the weights finds out; the one without must follow it."""
    wrong = make_tiny_llama(tmp_path / "model", width=16)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    losses, norms = run(wrong, tmp_path / "alone", 1, sharded=False)
    own_losses, own_norms = run(wrong, tmp_path / "sharded", 2, sharded=True)
    assert own_losses == pytest.approx(losses, abs=TOLERANCE)
    assert own_norms == pytest.approx(norms, abs=TOLERANCE)
    same_end(tmp_path / "sharded", tmp_path / "alone", "full")


def test_a_checkpoint_is_for_any_number_of_workers(model: Path, tmp_path: Path, full: Alone) -> None:
    """Two workers with a part each, then one with all of it, then three with a part each."""
    folder, losses, _ = full
    first, _ = run(model, tmp_path, 2, sharded=True, stop_after=2)
    second, _ = run(model, tmp_path, 1, sharded=False, stop_after=3)
    third, _ = run(model, tmp_path, 3, sharded=True)
    assert (sorted(first), sorted(second), sorted(third)) == ([1, 2], [3, 4, 5], [6, 7, 8])
    assert first | second | third == pytest.approx(losses, abs=TOLERANCE)
    same_end(tmp_path, folder, "full")


def test_a_student_with_projections_of_its_objectives_own(model: Path, tmp_path: Path) -> None:
    """They are whole on every worker, beside a student of which each holds a part; a wider teacher makes them needed."""
    teacher = make_tiny_llama(tmp_path / "teacher", width=24, seed=3)
    forms = {"teacher": {"source": f"file://{teacher}"}, "labelWeight": 0, "feature": {"layers": [{"student": 1, "teacher": 1}]}}
    ends: list[tuple[dict[int, float], dict[int, float]]] = []
    for world in (1, 2):
        manifest = manifest_with(model, {"lora": {"rank": 2, "dropout": 0.0}}, **SETTINGS)
        manifest["spec"]["objective"] = {"distillation": forms}
        if world > 1:
            manifest["spec"]["compute"] = {"strategy": "fsdp"}
        ends.append(start(Run(manifest, model, tmp_path / str(world), world)))
    (losses, norms), (others, other_norms) = ends
    assert others == pytest.approx(losses, abs=TOLERANCE)
    assert other_norms == pytest.approx(norms, abs=TOLERANCE)
    same_end(tmp_path / "1", tmp_path / "2", "lora")
