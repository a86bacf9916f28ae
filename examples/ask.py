"""Asks a model the same questions before and after its tuning, and shows the answers side by side.

Nothing here comes from this project: transformers and peft load what was published, as they do anywhere else.

    python examples/ask.py --base examples/models/tiny-llama --adapter examples/.finetune/claims/quickstart/out/adapter
    python examples/ask.py --base examples/models/tiny-llama --model examples/methods/.finetune/claims/quickstart/out/full/model
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

# Worded as in none of the examples that the quickstart trains on.
QUESTIONS = (
    "Does the thermostat come with a warranty?",
    "Please tell me how to reset it to factory settings.",
    "There is a code E07 on my screen. What now?",
)


def answer(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int) -> str:
    """The likeliest answer (greedy decoding), at most `tokens` long."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base model with a published adapter. PEFT has no bottleneck adapters: their folder holds the file that adds them."""
    if (folder / "bottleneck_adapter.py").exists():
        sys.path.insert(0, str(folder))
        importlib.import_module("bottleneck_adapter")
    return PeftModel.from_pretrained(base, str(folder))


def main() -> None:
    """Load, ask, show."""
    parser = argparse.ArgumentParser(description="Ask a model the same questions before and after its tuning.")
    parser.add_argument("--base", required=True, help="base model: a folder, or a name on the hub")
    tuned_folder = parser.add_mutually_exclusive_group(required=True)
    tuned_folder.add_argument("--adapter", type=Path, help="folder of the adapter")
    tuned_folder.add_argument("--model", type=Path, help="folder of the tuned model, of the artifact merged or model")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer, in tokens")
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(arguments.adapter or arguments.model)
    base = AutoModelForCausalLM.from_pretrained(arguments.base).eval()
    before = [answer(base, tokenizer, question, arguments.tokens) for question in arguments.questions]
    tuned = with_adapter(base, arguments.adapter) if arguments.adapter else AutoModelForCausalLM.from_pretrained(arguments.model)
    after = [answer(tuned.eval(), tokenizer, question, arguments.tokens) for question in arguments.questions]

    table = Table("question", "before", "after", show_lines=True)
    for row in zip(arguments.questions, before, after, strict=True):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
