"""Useful tokens per second and peak memory of this trainer and of TRL's SFTTrainer on the same model, data and method.

Useful tokens are tokens of examples: padding does not count. Each run is a process of its own; variants take turns, so that a machine
whose speed drifts slows all of them. A run measures itself from the end of its first optimiser step to that of its last, so imports and
loading do not count. On a CPU each has one thread, since threads that wait for each other suffer most from other programs.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from tests.bench.subjects import EIGHT_B, HALF_B, LENGTH, SMALL, Subject, make_model, make_texts, parameters

ROOT = Path(__file__).parents[2]
ROWS, BATCH, RANK, RATE = 4, 8, 8, 1e-4
"""Rows of 512 tokens in a packed step; examples in a step that is not packed, which is TRL's default."""
EPOCHS = 2
TEXTS, ONE_TEXT = "texts.jsonl", "one.jsonl"
METHODS = ("lora", "full")
Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What seconds are: those of the clock, or those that the process itself computed, for a machine with other work. Not for a GPU."""
SUBJECTS = {"small": SMALL, "0.5B": HALF_B, "8B": EIGHT_B}


def compare(pairs: int, folder: Path, size: str | None = None, clock: Clock = "wall") -> Table:
    """Run all variants in turn and tabulate the medians."""
    size = size or ("0.5B" if torch.cuda.is_available() else "small")
    subject = SUBJECTS[size]
    folder.mkdir(parents=True, exist_ok=True)
    make_model(subject, folder / "model")
    make_texts(subject, folder / TEXTS)
    (folder / ONE_TEXT).write_text('{"text": "w3 w4 w5"}\n', encoding="utf-8")
    runs: dict[tuple[str, str], list[dict[str, float]]] = {(method, name): [] for method in METHODS for name in VARIANTS}
    for turn in range(pairs):
        for (method, name), measured in runs.items():
            print(f"training: {method}, {name}, run {turn + 1} of {pairs}", flush=True)
            measured.append(_run((method, name), folder, turn, clock))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"one CPU thread, {clock} time"
    table = Table(
        title=f"{subject.name}, {subject.texts} texts of 16 to {LENGTH} tokens ({_useful(folder):,} useful tokens), bf16, {device}",
        title_justify="left",
    )
    for column in ("method", "variant", "useful tokens/s", "min to max", "times TRL's default", "peak memory, MB", "MFU"):
        table.add_column(column, justify="left" if column in ("method", "variant") else "right")
    for method in METHODS:
        for name in VARIANTS:
            table.add_row(*_row(method, name, runs, subject))
        table.add_section()
    return table


def _row(method: str, name: str, runs: dict[tuple[str, str], list[dict[str, float]]], subject: Subject) -> list[str]:
    mine, base = runs[method, name], runs[method, TRL_DEFAULT]
    rates = [run["tokens_per_second"] for run in mine]
    ratio = statistics.median(rate / other["tokens_per_second"] for rate, other in zip(rates, base, strict=True))
    memory = statistics.median(run["megabytes"] for run in mine)
    utilisation = "-"
    if torch.cuda.is_available():
        flops = (4 if method == "lora" else 6) * parameters(subject) * statistics.median(rates)
        utilisation = f"{flops / _peak_flops():.0%}"
    spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
    return [method, name, f"{statistics.median(rates):,.0f}", spread, f"{ratio:.2f}", f"{memory:,.0f}", utilisation]


def _peak_flops() -> float:
    """Products of two large bf16 matrices per second, measured: what the utilisation is a share of."""
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(10):
            matrix @ matrix
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * 8192**3 / (time.perf_counter() - begun))
    return best


def _run(what: tuple[str, str], folder: Path, turn: int, clock: Clock) -> dict[str, float]:
    method, name = what
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"} | threads
    own = folder / f"{method}-{VARIANTS[name].__name__}-{turn}"
    own.mkdir()
    command = [sys.executable, "-m", "tests.bench.training", method, name, str(folder), str(own), clock]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def ours(method: str, folder: Path, own: Path, now: Callable[[], float]) -> tuple[int, float]:
    """This trainer's loop, in one process."""
    from fsspec.implementations.local import LocalFileSystem
    from tests.prepared_data import prepare_data

    from finetune_api.v1alpha1 import parse_job
    from finetune_trainer import loop
    from finetune_trainer.model import inspect_model
    from finetune_trainer.model_files import fetch_model
    from finetune_trainer.placement import placed
    from finetune_trainer.progress import WorkerProgress
    from finetune_trainer.sources import Mounts
    from finetune_trainer.storage import Storage
    from finetune_trainer.worker import Worker

    spec = {
        "model": {"source": f"file://{folder / 'model'}"},
        "data": {"train": {"source": f"file://{folder / TEXTS}"}, "validation": {"source": f"file://{folder / ONE_TEXT}"}},
        "method": {"lora": {"rank": RANK, "alpha": 2 * RANK}} if method == "lora" else {"full": {}},
        "training": {
            "epochs": EPOCHS,
            "globalBatchSize": ROWS,
            "maxSequenceLength": LENGTH,
            "learningRate": RATE,
            "precision": "bfloat16",
        },
        "checkpoint": {"everySteps": 1000000},
        "output": {"storage": f"file://{own}"},
    }
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench", "uid": "bench"}, "spec": spec}
    job = parse_job(manifest, local=True)
    mounts = Mounts(own, local=True)
    files = fetch_model(job.spec.model, mounts, own / "cache", weights=True)
    data = prepare_data(job, inspect_model(files, job).tokenizer, mounts, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    class Listener:
        stop_requested = False
        regroup_requested = False
        told: list[tuple[float, int, int]] = []

        def post(self, progress: WorkerProgress) -> None:
            if progress.step > 0 and progress.stage == "Train":
                if device.type == "cuda":
                    torch.cuda.synchronize()
                self.told.append((now(), progress.step, progress.trained_tokens))

    listener = Listener()
    storage = Storage(LocalFileSystem(), str(own), f"file://{own}")
    worker = Worker(device=device)
    model, _ = placed(files, job, worker)
    loop.train(loop.Task(job, files.base, {}, storage), loop.Models(model), data, worker, listener)
    steps = {step: (at, tokens) for at, step, tokens in reversed(listener.told)}  # when each step was first told of
    first, last = steps[min(steps)], steps[max(steps)]
    return last[1] - first[1], last[0] - first[0]


def _trl(method: str, folder: Path, own: Path, now: Callable[[], float], **options: Any) -> tuple[int, float]:
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = load_dataset("json", data_files=str(folder / TEXTS), split="train", cache_dir=str(own / "cache"))

    class Listener(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.begun = self.ended = 0.0

        def on_step_end(self, *_: object, **__: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ended = now()
            self.begun = self.begun or self.ended

    listener = Listener()
    settings = {
        "output_dir": str(own),
        "num_train_epochs": EPOCHS,
        "learning_rate": RATE,
        "max_length": LENGTH,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **options,
    }
    # TRL loads what it is given a name of in float32, and full tuning is in float32 here, too.
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear") if method == "lora" else None,
        callbacks=[listener],
    )
    trainer.train()
    steps = trainer.state.global_step
    # The first step is not on the clock, so neither are its tokens.
    return round(_useful(folder) * EPOCHS * (steps - 1) / steps), listener.ended - listener.begun


def trl_default(method: str, folder: Path, own: Path, now: Callable[[], float]) -> tuple[int, float]:
    """TRL as its defaults have it: batches of 8, padded, activations computed twice."""
    return _trl(method, folder, own, now)


def trl_padding_free(method: str, folder: Path, own: Path, now: Callable[[], float]) -> tuple[int, float]:
    """TRL's batches of 8 without padding, activations kept."""
    return _trl(
        method, folder, own, now, padding_free=True, max_length=None, gradient_checkpointing=False, per_device_train_batch_size=BATCH
    )


def trl_packed(method: str, folder: Path, own: Path, now: Callable[[], float]) -> tuple[int, float]:
    """TRL's packing a row at a time, which is its fastest here, with as many tokens in a step as ours, activations kept."""
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS}
    return _trl(method, folder, own, now, packing=True, gradient_checkpointing=False, **one)


Variant = Callable[[str, Path, Path, Callable[[], float]], tuple[int, float]]
"""Of a method, the folder of model and texts, one of its own, and a clock: useful tokens on the clock, and the seconds."""
TRL_DEFAULT = "TRL SFTTrainer, default"
VARIANTS: dict[str, Variant] = {
    TRL_DEFAULT: trl_default,
    "TRL SFTTrainer, padding-free": trl_padding_free,
    "TRL SFTTrainer, packing": trl_packed,
    "this trainer (packing)": ours,
}


def _megabytes() -> float:
    """Most memory that this process ever had: on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _useful(folder: Path) -> int:
    """Tokens of all texts, each with its end token."""
    lines = (folder / TEXTS).read_text(encoding="utf-8").splitlines()
    return sum(len(json.loads(line)["text"].split()) + 1 for line in lines)


def _main(method: str, name: str, folder: str, own: str, clock: Clock) -> None:
    tokens, seconds = VARIANTS[name](method, Path(folder), Path(own), CLOCKS[clock])
    print(json.dumps({"seconds": seconds, "tokens_per_second": tokens / seconds, "megabytes": _megabytes()}))


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
