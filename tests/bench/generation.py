"""Answering prompts: tokens per second of the trainer's way, beside transformers' own `generate` with all rows of a batch or with one.

Prompts of several lengths and answers that end at several lengths, as they do: half of them after a few tokens. What is counted is the
tokens of the answers. Then the references of as many examples: tokens per second whose loss is measured.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tests.bench.subjects import HALF_B, SMALL, Subject, make_model

PROMPTS = {"cpu": 48, "cuda": 512}
LENGTHS = (8, 96)
"""Tokens of a prompt, from and to."""
NEW = 64
"""Tokens of the longest answers."""
ALONE = 6
"""Prompts that are answered one after the other."""


def answer(folder: Path) -> Table:
    """Make a model, have it answer, and tabulate."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = HALF_B if device.type == "cuda" else SMALL
    figures = measure(make_model(subject, folder), subject, device)
    title = f"Answering with a {subject.name}, {_where(device)}: {PROMPTS[device.type]} prompts of {LENGTHS[0]} to {LENGTHS[1]} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("", "tokens/s", "beside the trainer's"):
        table.add_column(column, justify="right" if column else "left")
    ours = figures["the trainer"]
    for name, value in figures.items():
        table.add_row(name, f"{value:,.0f}", "" if "reference" in name else f"{value / ours:.2f}")
    return table


def _where(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def measure(folder: Path, subject: Subject, device: torch.device) -> dict[str, float]:
    """Tokens per second by the way in which they were made."""
    from transformers import AutoTokenizer

    from finetune_trainer.attention import choose_layout
    from finetune_trainer.data.examples import join
    from finetune_trainer.generation import Speaker, Voice
    from finetune_trainer.methods.method import BaseModel
    from finetune_trainer.model import CausalModel, head_scale, load_transformer
    from finetune_trainer.model_files import ModelFiles

    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    files = ModelFiles(folder, BaseModel("bench", None, "bfloat16"), "sha256:0", ("model.safetensors",))
    transformer = load_transformer(files, precision, device)
    prompts, lasting = _questions(subject, PROMPTS[device.type])
    plain = _by_generate(transformer, prompts, lasting, device)
    layout = choose_layout(transformer)
    scale = head_scale(transformer, layout)
    model = CausalModel(transformer, transformer, layout, scale, precision, device, tuned=False)
    speaker = Speaker(Voice(model, AutoTokenizer.from_pretrained(folder), None))

    def ours() -> int:
        decoder = speaker._decoder
        made = 0
        with decoder.ready():
            for batch in speaker._bounds.batches([len(prompts[index]) + lasting[index] for index in range(len(prompts))]):
                rows = decoder.follow([prompts[index] for index in batch], [lasting[index] for index in batch], frozenset())
                made += sum(map(len, rows))
        return made

    def references() -> int:
        rows = [np.array(prompt * 2, dtype=np.int32) for prompt in prompts]
        found = speaker.measured(join([(row, np.arange(len(row)) >= len(row) // 2) for row in rows]))
        return sum(each.labels for each in found)

    return {"the trainer": _speed(ours, device), **plain, "references": _speed(references, device)}


def _questions(subject: Subject, count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how long the answer to each is: half are short."""
    draw = np.random.Generator(np.random.Philox(0))
    lengths = draw.integers(*LENGTHS, count, endpoint=True)
    prompts = [draw.integers(3, subject.vocabulary, length).tolist() for length in lengths]
    lasting = np.where(draw.random(count) < 0.5, draw.integers(1, NEW // 4, count), draw.integers(NEW // 4, NEW, count, endpoint=True))
    return prompts, lasting.tolist()


def _by_generate(transformer: Any, prompts: list[list[int]], lasting: list[int], device: torch.device) -> dict[str, float]:
    """transformers' own: a batch of 16 in the order that they come, padded on the left; and one after the other."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def together() -> int:
        for start in range(0, len(prompts), 16):
            rows, most = prompts[start : start + 16], max(lasting[start : start + 16])
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
            transformer.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, **options)
        return sum(lasting)

    def alone() -> int:
        for prompt, most in zip(prompts[:ALONE], lasting[:ALONE], strict=True):
            ids = torch.tensor([prompt], device=device)
            transformer.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, **options)
        return sum(lasting[:ALONE])

    return {"transformers, 16 rows as they come": _speed(together, device), "transformers, one after the other": _speed(alone, device)}


def _speed(call: Callable[[], int], device: torch.device) -> float:
    """Tokens per second of the second time."""
    call()
    begun = time.perf_counter()
    made = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return made / (time.perf_counter() - begun)
