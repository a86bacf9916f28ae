"""What the workers say of their own speed, in a real training on this machine."""

import time
from datetime import datetime
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import Listener, job_with, run

from finetune_trainer.model_files import fetch_model
from finetune_trainer.sources import Mounts


def test_steps_and_checkpoints_are_timed_and_weighed(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", width=16, layers=1)
    files = fetch_model(job_with(folder).spec.model, Mounts(folder, local=True), tmp_path / "cache", weights=True)
    listener, begun, wall = Listener(), time.monotonic(), time.time()
    assert run(files, tmp_path / "out", listener, epochs=1)
    took = time.monotonic() - begun
    paces = [told.pace for told in listener.told if told.pace]
    last = paces[-1]
    # Steps are a part of the whole, and each new one adds its own time.
    assert 0 < last.stepping_seconds < took
    durations = {pace.stepping_seconds: pace.step_seconds for pace in paces if pace.step_seconds}
    assert len(durations) == listener.told[-1].step
    assert sum(durations.values()) == pytest.approx(last.stepping_seconds)
    # What is said of the checkpoint is said of the newest one.
    (newest, *_) = sorted((tmp_path / "out" / "checkpoints").glob("step-*"), reverse=True)
    tensors = [tensor for path in newest.glob("*.safetensors") for tensor in load_file(path).values()]
    assert last.checkpoint_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert last.checkpoint_seconds is not None
    assert 0 < last.checkpoint_seconds < took
    assert last.checkpoint_time is not None
    assert wall - 1 <= datetime.fromisoformat(last.checkpoint_time).timestamp() <= wall + took + 1
    # A CPU's memory and speed are not known.
    assert (last.memory_peak_bytes, last.peak_flops) == (None, None)
