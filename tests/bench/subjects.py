"""What the benchmark trains: a Llama with random weights in one of a few sizes, and texts of 16 to 512 tokens.

The tokenizer knows as many words as the model has tokens, one token each, so the number of useful tokens is known beforehand.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LENGTH = 512
SHORTEST = 16


@dataclass(frozen=True)
class Subject:
    """A model's shape and how many texts it is trained on."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    texts: int


SMALL = Subject("Llama of 40M parameters", 6, 512, 1408, 8, 4, 16384, 32)
"""As large as two CPU cores can train in a coffee break."""
HALF_B = Subject("Llama of 0.5B parameters (Qwen2.5-0.5B's shape)", 24, 896, 4864, 14, 2, 151936, 2048)
EIGHT_B = Subject("Llama of 8B parameters (Llama-3-8B's shape)", 32, 4096, 14336, 32, 8, 128256, 512)


def make_model(subject: Subject, folder: Path) -> Path:
    """Write model and tokenizer as transformers loads them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{index}": index for index in range(3, subject.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=subject.vocabulary,
        hidden_size=subject.width,
        intermediate_size=subject.inner,
        num_hidden_layers=subject.layers,
        num_attention_heads=subject.heads,
        num_key_value_heads=subject.key_heads,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_texts(subject: Subject, path: Path) -> int:
    """Write the texts, a row each; the number of their tokens, the end tokens included."""
    draw = np.random.Generator(np.random.Philox(0))
    lengths = draw.integers(SHORTEST, LENGTH, subject.texts, endpoint=True)
    with path.open("w", encoding="utf-8") as file:
        for length in lengths:
            words = draw.integers(3, subject.vocabulary, length - 1)
            file.write(json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n")
    return int(lengths.sum())


def parameters(subject: Subject) -> int:
    """Weights of the layers and the output matrix: what a token is multiplied with (the embedding is looked up)."""
    head = subject.width // subject.heads
    attention = subject.width * head * (2 * subject.heads + 2 * subject.key_heads)
    return subject.layers * (attention + 3 * subject.width * subject.inner) + subject.vocabulary * subject.width
