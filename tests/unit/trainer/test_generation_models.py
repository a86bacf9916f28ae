"""Architectures whose attention, positions or state are unlike Llama's say what transformers' own `generate` has them say."""

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from finetune_trainer.attention import choose_layout
from finetune_trainer.decoding import Decoder
from finetune_trainer.model import CausalModel, head_scale

SHARED: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = frozenset({256})
KEPT = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=96),
    "opt": OPTConfig(**SHARED, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=96),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "neox": GPTNeoXConfig(**SHARED, intermediate_size=48),
    "mistral": MistralConfig(**SHARED, num_key_value_heads=2, intermediate_size=48, sliding_window=6),
    "gemma2": Gemma2Config(**SHARED, num_key_value_heads=2, head_dim=8, intermediate_size=48, sliding_window=6),
    "qwen3": Qwen3Config(**SHARED, num_key_value_heads=2, head_dim=8, intermediate_size=48),
}
COMPUTED_ANEW = {"mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)}
ROWS = [[65, 66, 67], [70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81], [90], [33, 34, 99, 98, 97, 96, 95]]


@pytest.mark.parametrize("name", [*KEPT, *COMPUTED_ANEW])
def test_rows_of_several_lengths_go_on_as_each_does_alone(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    config = {**KEPT, **COMPUTED_ANEW}[name]
    config.eos_token_id, config.pad_token_id, config.initializer_range = 256, 0, 0.5
    torch.manual_seed(1)
    module = AutoModelForCausalLM.from_config(config).eval()
    expected = []
    for row in ROWS:
        ids = torch.tensor([row])
        made = module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False, eos_token_id=256, pad_token_id=0
        )[0, len(row) :].tolist()
        expected.append(made[: made.index(256)] if 256 in made else made)
    layout = choose_layout(module)
    model = CausalModel(module, module, layout, head_scale(module, layout), torch.float32, torch.device("cpu"), tuned=False)
    decoder = Decoder(model)
    with decoder.ready():
        found = decoder.follow(ROWS, [14] * len(ROWS), ENDS)
        assert decoder.keeps == (name in KEPT)
    assert found == expected
    assert len({tuple(each) for each in found}) > 1
