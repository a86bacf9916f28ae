"""Checkpoints: whole and proven, or not taken. Every kind of damage is done to the files themselves."""

import errno
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from finetune_api.reasons import Reason
from finetune_trainer import checkpoint
from finetune_trainer.checkpoint import SavedState, TrainingState
from finetune_trainer.errors import JobError
from finetune_trainer.stopping import Validations
from finetune_trainer.storage import Storage

CONFIG = {"model": {"revision": "r1"}, "method": {"lora": {"rank": 8}}}


def storage_in(folder: Path) -> Storage:
    return Storage(LocalFileSystem(), str(folder), f"file://{folder}")


def state_at(step: int) -> TrainingState:
    weights = torch.arange(12, dtype=torch.float32).reshape(3, 4) + step
    return TrainingState(
        step, 100 * step, {"layer.weight": weights}, {"layer.weight/exp_avg": weights / 3, "layer.weight/step": torch.tensor(float(step))}
    )


def tensors_of(storage: Storage, state: SavedState) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    with checkpoint.opened(storage, state) as (parameters, moments):
        return {name: saved.whole() for name, saved in parameters.items()}, {name: saved.whole() for name, saved in moments.items()}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return storage_in(tmp_path / "checkpoints")


def test_what_is_saved_is_what_is_read(storage: Storage) -> None:
    uri = checkpoint.save(storage, state_at(7), CONFIG, keep=2)
    assert uri.endswith("/checkpoints/step-00000007")
    state, damaged = checkpoint.newest(storage, CONFIG)
    assert state is not None
    assert damaged == ()
    assert (state.step, state.trained_tokens) == (7, 700)
    parameters, moments = tensors_of(storage, state)
    assert torch.equal(parameters["layer.weight"], state_at(7).parameters["layer.weight"])
    assert torch.equal(moments["layer.weight/exp_avg"], state_at(7).moments["layer.weight/exp_avg"])
    assert moments["layer.weight/step"].item() == 7
    with checkpoint.opened(storage, state) as (saved, _):
        assert saved["layer.weight"].shape == (3, 4)
        assert torch.equal(saved["layer.weight"].rows(1, 3), state_at(7).parameters["layer.weight"][1:3])
        assert saved["layer.weight"].rows(2, 2).shape == (0, 4)


def test_nothing_saved_is_nothing_read(storage: Storage) -> None:
    assert checkpoint.newest(storage, CONFIG) == (None, ())


def test_bfloat16_stays_what_it_is(storage: Storage) -> None:
    weights = torch.tensor([1.5, -2.25, 3e-5], dtype=torch.bfloat16)
    checkpoint.save(storage, TrainingState(1, 1, {"w": weights}, {}), CONFIG, keep=1)
    state, _ = checkpoint.newest(storage, CONFIG)
    assert state is not None
    parameters, _ = tensors_of(storage, state)
    assert parameters["w"].dtype == torch.bfloat16
    assert torch.equal(parameters["w"], weights)


def test_the_newest_are_kept(storage: Storage) -> None:
    for step in (9, 10, 11, 100):
        checkpoint.save(storage, state_at(step), CONFIG, keep=2)
    assert storage.folders() == ["step-00000011", "step-00000100"]


def test_one_that_was_not_finished_never_takes_the_place_of_a_good_one() -> None:
    """In an object store the files of an upload that was killed stay, and look newer than what is saved after going on from before."""
    MemoryFileSystem.store.clear()
    storage = Storage(MemoryFileSystem(), "/bucket/checkpoints", "s3://bucket/checkpoints")
    checkpoint.save(storage, state_at(10), CONFIG, keep=1)
    storage.fs.pipe_file("/bucket/checkpoints/step-00000020/model.safetensors", b"half")
    checkpoint.save(storage, state_at(15), CONFIG, keep=1)
    state, _ = checkpoint.newest(storage, CONFIG)
    assert state is not None
    assert state.step == 15
    checkpoint.save(storage, state_at(30), CONFIG, keep=1)
    assert storage.folders() == ["step-00000030"]


def test_the_best_is_kept_beside_the_newest(storage: Storage) -> None:
    """Losses 3, 1, 2, 2 after steps 10, 20, 30, 40, each measured after its checkpoint was saved."""
    validations = Validations()
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)):
        checkpoint.save(storage, replace(state_at(step), validations=validations), CONFIG, keep=1)
        validations = validations.after(step, loss, None)
    assert storage.folders() == ["step-00000020", "step-00000050"]
    state, _ = checkpoint.newest(storage, CONFIG)
    assert state is not None
    assert (state.validations.step, state.validations.best_step, state.validations.best_loss) == (40, 20, 1.0)
    assert checkpoint.find(storage, 20, CONFIG).step == 20
    truncate(Path(storage.root) / "step-00000020")
    with pytest.raises(JobError, match="step-00000020 cannot be read"):
        checkpoint.find(storage, 20, CONFIG)


def test_what_was_set_aside_goes_at_the_end(storage: Storage) -> None:
    checkpoint.save(storage, state_at(10), CONFIG, keep=2)
    checkpoint.save(storage, state_at(20), CONFIG, keep=2)
    truncate(Path(storage.root) / "step-00000020")
    checkpoint.newest(storage, CONFIG)
    checkpoint.remove_damaged(storage)
    assert storage.folders() == ["step-00000010"]


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def flip_a_byte(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(bytes(content))


def lose_a_file(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:50])


def change_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))


@pytest.mark.parametrize("harm", [truncate, flip_a_byte, lose_a_file, lose_the_manifest, cut_the_manifest, change_the_manifest])
def test_a_damaged_one_is_set_aside_and_the_one_before_is_taken(storage: Storage, harm: Callable[[Path], None]) -> None:
    checkpoint.save(storage, state_at(10), CONFIG, keep=2)
    checkpoint.save(storage, state_at(20), CONFIG, keep=2)
    harm(Path(storage.root) / "step-00000020")
    state, damaged = checkpoint.newest(storage, CONFIG)
    assert state is not None
    assert state.step == 10
    assert damaged == ("step-00000020",)
    assert storage.folders() == ["damaged-step-00000020", "step-00000010"]


def test_all_damaged_is_a_new_beginning(storage: Storage) -> None:
    checkpoint.save(storage, state_at(10), CONFIG, keep=2)
    truncate(Path(storage.root) / "step-00000010")
    assert checkpoint.newest(storage, CONFIG) == (None, ("step-00000010",))


def test_one_that_was_begun_and_not_ended_is_not_seen(storage: Storage) -> None:
    checkpoint.save(storage, state_at(10), CONFIG, keep=2)
    half = Path(storage.root) / ".step-00000020.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    state, damaged = checkpoint.newest(storage, CONFIG)
    assert state is not None
    assert (state.step, damaged) == (10, ())
    checkpoint.save(storage, state_at(20), CONFIG, keep=2)
    assert not half.exists()
    assert checkpoint.newest(storage, CONFIG)[0] is not None


def test_another_configuration_is_refused_with_what_differs(storage: Storage) -> None:
    checkpoint.save(storage, state_at(10), CONFIG, keep=2)
    with pytest.raises(JobError, match=r"method\.lora\.rank was 8, now 16; model\.revision was 'r1', now 'r2'") as caught:
        checkpoint.newest(storage, {"model": {"revision": "r2"}, "method": {"lora": {"rank": 16}}})
    assert caught.value.reason == Reason.CHECKPOINT_INCOMPATIBLE


def test_a_full_disk_keeps_what_was_there(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(storage, state_at(10), CONFIG, keep=1)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"as far as it went")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(JobError, match="no space is left") as caught:
            checkpoint.save(storage, state_at(20), CONFIG, keep=1)
    assert caught.value.reason == Reason.STORAGE_FULL
    assert sorted(path.name for path in Path(storage.root).iterdir()) == ["step-00000010"]
    state, damaged = checkpoint.newest(storage, CONFIG)
    assert state is not None
    assert (state.step, damaged) == (10, ())


def test_the_manifest_lists_what_sha256sum_says(storage: Storage) -> None:
    checkpoint.save(storage, state_at(3), CONFIG, keep=1)
    folder = Path(storage.root) / "step-00000003"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["model.safetensors", "optimizer.safetensors"]
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
