"""Useful tokens per second of this trainer and of TRL's SFTTrainer on the same model, data, method and precision.

Useful tokens are tokens of examples: padding does not count. Each run is a process of its own; variants take turns, so that a machine
whose speed drifts slows all of them; each has one thread, since threads that wait for each other suffer most from other programs.
A run measures itself from its first optimiser step to its last, so imports and loading do not count.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "tiny-llama"
DATA = ROOT / "examples" / "data" / "support" / "train.jsonl"
LENGTH, ROWS, EPOCHS, RANK, RATE = 256, 8, 3, 16, 1e-3


def compare(pairs: int, folder: Path) -> Table:
    """Run all variants in turn and tabulate the medians."""
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(pairs):
        for name in VARIANTS:
            print(f"training: {name}, run {turn + 1} of {pairs}", flush=True)
            rates[name].append(_run(name, folder / f"{VARIANTS[name].__name__}-{turn}")["tokens_per_second"])
    table = Table(title=f"LoRA rank {RANK} on the quickstart's model and data, fp32, one CPU thread, {EPOCHS} epochs", title_justify="left")
    for column in ("variant", "useful tokens/s, median", "min", "max", "times TRL's default (median of pairs)"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    base = rates[TRL_DEFAULT]
    for name, values in rates.items():
        ratio = statistics.median(value / other for value, other in zip(values, base, strict=True))
        table.add_row(name, f"{statistics.median(values):,.0f}", f"{min(values):,.0f}", f"{max(values):,.0f}", f"{ratio:.2f}")
    return table


def _run(name: str, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.bench.training", name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def ours(folder: Path) -> tuple[int, float]:
    """This trainer's loop, packed, in one process."""
    import torch
    from fsspec.implementations.local import LocalFileSystem

    from finetune_api.v1alpha1 import parse_job
    from finetune_trainer import loop
    from finetune_trainer.data.examples import Prepared, join
    from finetune_trainer.data.prepare import prepare_data
    from finetune_trainer.model import check_model, load_model
    from finetune_trainer.model_files import fetch_model
    from finetune_trainer.progress import WorkerProgress
    from finetune_trainer.sources import Mounts
    from finetune_trainer.storage import Storage
    from finetune_trainer.worker import Worker

    spec = {
        "model": {"source": f"file://{MODEL}"},
        "data": {"train": {"source": f"file://{DATA}"}},
        "method": {"lora": {"rank": RANK, "alpha": 2 * RANK}},
        "training": {"epochs": EPOCHS, "globalBatchSize": ROWS, "maxSequenceLength": LENGTH, "learningRate": RATE, "precision": "float32"},
        "checkpoint": {"everySteps": 1000000},
        "output": {"storage": f"file://{folder}"},
    }
    job = parse_job(
        {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench", "uid": "bench"}, "spec": spec},
        local=True,
    )
    mounts = Mounts(folder, local=True)
    files = fetch_model(job.spec.model, mounts, folder / "cache", weights=True)
    prepared = prepare_data(job, check_model(files, job), mounts, None)
    # Only the steps are measured: nothing is held out, and what is left to measure before and after is one example.
    data = Prepared(train=prepared.train, validation=join([prepared.train.example(0)]), test=None, rejected=0, digest=prepared.digest)

    class Clock:
        stop_requested = False
        told: list[tuple[float, int, int]] = []

        def post(self, progress: WorkerProgress) -> None:
            self.told.append((time.perf_counter(), progress.step, progress.trained_tokens))

    clock = Clock()
    task = loop.Task(job, files.base, {}, Storage(LocalFileSystem(), str(folder), f"file://{folder}"))
    loop.PROGRESS_SECONDS = 0.0
    loop.train(task, load_model(files, job, torch.device("cpu")), data, Worker(), clock)
    steps = [(at, tokens) for at, step, tokens in clock.told if step > 0]
    return steps[-1][1] - steps[0][1], steps[-1][0] - steps[0][0]


def _trl(folder: Path, **options: Any) -> tuple[int, float]:
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = load_dataset("json", data_files=str(DATA), split="train", cache_dir=str(folder / "cache"))

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.begun = self.ended = 0.0

        def on_step_end(self, *_: object, **__: object) -> None:
            self.ended = time.perf_counter()
            self.begun = self.begun or self.ended

    clock = Clock()
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "learning_rate": RATE,
        "max_length": LENGTH,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **options,
    }
    trainer = SFTTrainer(
        model=str(MODEL),
        args=SFTConfig(**settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.train()
    lengths = [len(tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]) for row in rows]
    steps = trainer.state.global_step
    # The first step is not on the clock, so neither are its tokens.
    return round(sum(lengths) * EPOCHS * (steps - 1) / steps), clock.ended - clock.begun


def trl_default(folder: Path) -> tuple[int, float]:
    """TRL as its defaults have it, but for gradient checkpointing, which costs it time and is not needed here."""
    return _trl(folder)


def trl_packed(folder: Path) -> tuple[int, float]:
    """TRL's packing, with as many tokens in a step as ours."""
    return _trl(folder, packing=True, per_device_train_batch_size=ROWS)


TRL_DEFAULT = "TRL SFTTrainer, default batches of 8"
VARIANTS: dict[str, Callable[[Path], tuple[int, float]]] = {
    TRL_DEFAULT: trl_default,
    "TRL SFTTrainer, packing": trl_packed,
    "finetune trainer (packing)": ours,
}


if __name__ == "__main__":
    tokens, seconds = VARIANTS[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}))
