"""Pretrains the tiny Llama model that the quickstart tunes.

It needs no download and no accelerator: the tokenizer and the weights are both made here, from text generated out of
the phrases next to this file, in a few minutes on two cores. The seed fixes the text, the initial weights and the order
of the batches; with the same versions and the same kind of processor the weights come out the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_llama_corpus import Conversation, conversations, load_phrases, vocabulary
from tiny_llama_tokenizer import chat_tokenizer, train_bpe
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
MAX_POSITIONS = 1024
TOKENIZER_SAMPLE = 20_000
POOL_BATCHES = 16
PREVIEW = ("How are you?", "How long is the warranty on my kettle?", "My printer shows E07.", "Where is the dial?")


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a pretraining run."""

    vocab_size: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up over the first twentieth, then a cosine to nearly zero."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_tokenizer(stream: Iterator[Conversation], words: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on the head of the corpus and on every word it has to know."""
    sample = itertools.islice(stream, TOKENIZER_SAMPLE)
    texts = [message["content"] for messages in sample for message in messages]
    spoken = [f"{word} {word}." for word in words for _ in range(20)]
    return chat_tokenizer(train_bpe(texts + spoken, vocab_size), MAX_POSITIONS)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about a million parameters, with freshly drawn weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def batches(
    stream: Iterator[Conversation], tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded token rows and their labels; padding is not learnt.

    Rows of similar length share a batch, which saves about half of the time that padding would take.
    """
    rng = random.Random(seed)  # noqa: S311 (reproducible text, no secrets)
    for pool in iter(lambda: list(itertools.islice(stream, batch_size * POOL_BATCHES)), []):
        texts = sorted((tokenizer.apply_chat_template(messages, tokenize=False) for messages in pool), key=len)
        groups = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            rows = tokenizer(group, add_special_tokens=False, padding=True, return_tensors="pt", padding_side="right")
            ids = rows["input_ids"]
            yield ids, ids.masked_fill(rows["attention_mask"] == 0, -100)


def optimizer_for(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    scales = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def pretrain(
    model: LlamaForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    recipe: Recipe,
) -> float:
    """Trains the model in place and returns the mean loss of the last hundred steps."""
    optimizer = optimizer_for(model, recipe.learning_rate)
    model.train()
    recent: list[float] = []
    started = time.monotonic()
    for step, (ids, labels) in enumerate(itertools.islice(data, recipe.steps)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        # Padding is on the right and attention is causal, so real tokens never see it and need no mask.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-99:], float(loss.detach())]
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}/{recipe.steps} loss {mean:.3f} {time.monotonic() - started:.0f}s", flush=True)
    return sum(recent) / len(recent)


def reply(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """Greedy answer to one question."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    rows = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**rows, max_new_tokens=60, do_sample=False)
    return str(tokenizer.decode(out[0, rows["input_ids"].shape[1] :], skip_special_tokens=True))


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy decoding, because the demo should give the same answer each time."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes a folder that the Auto classes load.

    The tensors are stored as bfloat16 to halve the file, while the configuration says float32: loading then gives
    float32 weights, the right thing to tune on a processor.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    state = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    state.pop("lm_head.weight", None)  # tied to the input embeddings
    weights = out / "model.safetensors"
    save_file(state, str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes for the owner only, and other users mount this folder
    tokenizer.save_pretrained(out)
    make_tokenizer_config_portable(out / "tokenizer_config.json")


def make_tokenizer_config_portable(path: Path) -> None:
    """Keeps to names that every transformers release since 4.0 reads; newer ones write their own.

    The role tokens need no mention here, since tokenizer.json already marks them as special.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    kept = {key: value for key, value in config.items() if key not in {"backend", "extra_special_tokens"}}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny Llama base model of the quickstart.")
    parser.add_argument("--out", type=Path, default=HERE / "tiny-llama", help="folder to write the model to")
    parser.add_argument("--phrases", type=Path, default=HERE / "tiny_llama_corpus.json", help="phrases of the corpus")
    parser.add_argument(
        "--facts",
        type=Path,
        default=HERE.parent / "data" / "support_facts.json",
        help="tuning facts; only their single words are used",
    )
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32, help="conversations per step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2, help="processor threads for torch")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the tokenizer, pretrains the model and writes both."""
    args = parse_args(argv)
    recipe = Recipe(args.vocab_size, args.steps, args.batch_size, args.learning_rate, args.seed)
    torch.set_num_threads(args.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    phrases = load_phrases(args.phrases)
    words = vocabulary(phrases, json.loads(args.facts.read_text(encoding="utf-8")))
    tokenizer = build_tokenizer(conversations(phrases, words, recipe.seed), words, recipe.vocab_size)
    model = build_model(tokenizer)
    model.generation_config = generation_config(tokenizer)
    print(f"{len(words)} words, {len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    stream = conversations(phrases, words, recipe.seed + 1)
    loss = pretrain(model, batches(stream, tokenizer, recipe.batch_size, recipe.seed), recipe)
    model.eval()
    for question in PREVIEW:
        print(f"user: {question}\nassistant: {reply(model, tokenizer, question)}", flush=True)
    save(model, tokenizer, args.out)
    print(f"wrote {args.out}, loss {loss:.3f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
