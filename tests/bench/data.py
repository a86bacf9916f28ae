"""Preparing data: tokens per second of each part of the way, and the memory that it takes, for some data and for four times as much.

Each figure comes from a process of its own: whole, as a job's head does it (hash, read, check, tokenise, divide, write, flush), whose peak
memory counts; then its parts one by one, on a sample. The same again finds the data in the cache.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "tiny-llama"
WORDS = ROOT / "examples" / "data" / "support" / "train.jsonl"
TOKENS = 10_000_000
SAMPLE = 8192
"""Rows that the parts are measured on."""
LENGTH = 2048


def prepare(folder: Path) -> Table:
    """Make the data, prepare it in several ways, and tabulate."""
    folder.mkdir(parents=True)
    whole, quarter, chats = folder / "whole.jsonl", folder / "quarter.jsonl", folder / "chats.jsonl"
    _make(whole, TOKENS, lambda words: {"text": words(20, 600)})
    _make(quarter, TOKENS // 4, lambda words: {"text": words(20, 600)})
    _make(chats, TOKENS // 4, lambda words: {"messages": [_turn("user", words(10, 100)), _turn("assistant", words(10, 500))]})
    table = Table(
        title=f"Preparing data with the quickstart's tokenizer, {os.cpu_count()} cores: millions of tokens/s", title_justify="left"
    )
    checks = ("leakage", "near duplicates")
    for column in ("data", "tokens", "read and check", "tokenise", "write", *checks, "pack", "all, as a job", "memory, peak", "before"):
        table.add_column(column, justify="left" if column == "data" else "right", no_wrap=column == "data")
    runs = {"texts, a quarter": quarter, "texts": whole, "texts, from the cache": whole, "conversations, a quarter": chats}
    for name, path in runs.items():
        print(f"data: {name}", flush=True)
        figures = _run(path)
        parts = [f"{figures[part] / 1e6:,.2f}" if part in figures else "" for part in ("read", "tokenise", "write", *checks, "pack")]
        memory = [f"{figures[key] / 2**20:.0f} MiB" for key in ("peak", "before")]
        table.add_row(name, f"{figures['tokens']:,}", *parts, f"{figures['tokens'] / figures['seconds'] / 1e6:,.2f}", *memory)
    return table


def _make(path: Path, tokens: int, row: Callable[[Callable[[int, int], str]], dict[str, object]]) -> None:
    """Rows of random words of the quickstart's, some four letters to a token, until there are surely so many tokens."""
    words = " ".join(turn["content"] for line in WORDS.read_text().splitlines() for turn in json.loads(line)["messages"]).split()
    generator = random.Random(0)  # noqa: S311 - no secret
    written = 0
    with path.open("w") as file:
        while written < 4 * tokens:
            line = json.dumps(row(lambda least, most: " ".join(generator.choices(words, k=generator.randint(least, most)))))
            written += file.write(line + "\n")


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _run(path: Path) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.bench.data", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"preparing {path.name} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(path: Path) -> dict[str, float]:
    """What a process of its own does: prepare as a job's head does, then the parts where something was done."""
    from fsspec.implementations.local import LocalFileSystem
    from transformers import AutoTokenizer

    from finetune_api.v1alpha1 import parse_job
    from finetune_trainer.data.writing import tokens_in
    from finetune_trainer.data_cache import find_or_prepare
    from finetune_trainer.sources import Mounts
    from finetune_trainer.storage import Storage

    out = path.parent / "out"
    spec = {
        "model": {"source": f"file://{MODEL}"},
        "data": {"train": {"source": f"file://{path}"}},
        "method": {"lora": {}},
        "training": {"maxSequenceLength": LENGTH},
        "output": {"storage": f"file://{out}"},
    }
    job = parse_job({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench"}, "spec": spec}, local=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    storage, mounts = Storage(LocalFileSystem(), str(out), f"file://{out}"), Mounts(path.parent, local=True)
    before, begun = _peak(), time.perf_counter()
    entry = find_or_prepare(storage, job, mounts, tokenizer)
    figures = {"seconds": time.perf_counter() - begun, "peak": _peak(), "before": before}
    folder = Path(storage.location(entry.name).path)
    tokens = sum(tokens_in(folder, split) for split in ("train", "validation"))
    return {"tokens": tokens, **figures, **(_parts(job, mounts, tokenizer, folder) if entry.is_new else {})}


def _parts(job: Any, mounts: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
    """Tokens per second of each part alone: of the first rows, and of packing all of them."""
    import numpy as np

    from finetune_trainer.data.batches import pack
    from finetune_trainer.data.encoding import Encoded, Encoder
    from finetune_trainer.data.prepare import inputs_of, loss_on
    from finetune_trainer.data.reading import examples_of
    from finetune_trainer.data.writing import SplitWriter

    seconds: dict[str, float] = {}

    def timed(name: str, rows: Iterator[Any]) -> list[Any]:
        begun = time.perf_counter()
        made = list(rows)
        seconds[name] = time.perf_counter() - begun
        return made

    def written(encoded: list[Encoded]) -> Iterator[None]:
        with SplitWriter(folder.parent, "sample") as writer:
            for item in encoded:
                yield writer.add(item.tokens, item.labelled)

    examples = timed("read", islice(examples_of(inputs_of(job, mounts)["train"].rows(), job), SAMPLE))
    encoded = timed("tokenise", Encoder(tokenizer, loss_on(job), LENGTH).encode(examples))
    timed("write", written(encoded))
    sample = sum(len(item.tokens) for item in encoded)
    lengths = np.diff(np.load(folder / "train-offsets.npy"))
    begun = time.perf_counter()
    pack(lengths, LENGTH)
    packed = int(lengths.sum()) / (time.perf_counter() - begun)
    return {name: sample / value for name, value in seconds.items()} | {"pack": packed, **_checks(folder, int(lengths.sum()))}


def _checks(folder: Path, tokens: int) -> dict[str, float]:
    """Tokens per second of the checks that compare examples: of all training examples with what is held out, and of the held-out ones."""
    import numpy as np

    from finetune_trainer.data.duplicates import duplicates
    from finetune_trainer.data.leakage import Some, leaks
    from finetune_trainer.data.writing import examples_in, tokens_in

    train, held = (Some(split, np.ones(examples_in(folder, split), np.bool_)) for split in ("train", "validation"))
    begun = time.perf_counter()
    leaks(folder, train, [held])
    leakage = time.perf_counter() - begun
    begun = time.perf_counter()
    duplicates(folder, "validation", "near")
    return {"leakage": tokens / leakage, "near duplicates": tokens_in(folder, "validation") / (time.perf_counter() - begun)}


def _peak() -> int:
    """The process's largest memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
