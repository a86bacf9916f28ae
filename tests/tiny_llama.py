"""A tiny Llama with random weights and a byte-level tokenizer, made in a moment, and a small task that it can learn."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_tiny_llama(folder: Path, *, width: int = 32, layers: int = 2, seed: int = 0, tied: bool = False) -> Path:
    """Write model and tokenizer as transformers loads them. The vocabulary is the 256 bytes and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(special + alphabet)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(special) + len(alphabet),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_questions(path: Path, count: int, *, start: int = 0) -> Path:
    """`count` rows of the form promptCompletion: the word of each number's last digit."""
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    rows = [{"prompt": f"{number} ends in ", "completion": words[number % 10]} for number in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def teach_tiny_llama(folder: Path, rows: Sequence[Mapping[str, str]], *, steps: int = 60) -> None:
    """Have the model in a folder learn rows of the form promptCompletion by heart, in plain torch."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)
    texts = [f"{row['prompt']}{row['completion']}{tokenizer.eos_token}" for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with torch.random.fork_rng():
        for _ in range(steps):
            optimizer.zero_grad()
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
