"""The tokens are those that transformers gives; the labels are worked out by hand."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import CHATML, byte_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_trainer.data.tokenising import Marked, Tokeniser, identity_of

MODEL = Path(__file__).parents[3] / "examples" / "models" / "tiny-llama"
TEXTS = ["Which batteries do I need?", "", "  naïve 😀 <eos>", "It needs two AA lithium batteries. " * 40]


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerBase:
    """A tokenizer that puts several letters into a token."""
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("spans", [None, ((0, 4),)])
@pytest.mark.parametrize("special", [True, False])
def test_the_tokens_are_those_of_transformers(trained: PreTrainedTokenizerBase, spans: tuple | None, special: bool) -> None:
    tokens = [tokens.tolist() for tokens, _ in Tokeniser(trained).tokens([Marked(t, spans) for t in TEXTS], add_special_tokens=special)]
    assert tokens == trained(TEXTS, add_special_tokens=special)["input_ids"]


def test_a_token_is_learnt_where_it_holds_a_character_that_is(trained: PreTrainedTokenizerBase) -> None:
    """Of `batteries` the part from its fourth letter on is to be learnt: a token that begins before it and reaches into it counts."""
    text = TEXTS[0]
    offsets = trained(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    start, end = text.index("batteries") + 3, text.index(" do")
    ((tokens, labelled),) = Tokeniser(trained).tokens([Marked(text, ((start, end),))], add_special_tokens=False)
    assert len(tokens) == len(offsets)
    assert labelled.tolist() == [any(start <= character < end for character in range(*offset)) for offset in offsets]
    assert 0 < labelled.sum() < len(tokens)


def test_what_a_tokenizers_file_asks_for_is_not_done(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    tokens = [len(tokens) for tokens, _ in Tokeniser(tokenizer).tokens([Marked("abcde", None), Marked("a", None)], add_special_tokens=True)]
    assert tokens == [5, 1]


def test_all_of_it_where_no_span_is_named() -> None:
    (_, whole), (_, part) = Tokeniser(byte_tokenizer()).tokens([Marked("abc", None), Marked("abc", ((1, 2),))], add_special_tokens=False)
    np.testing.assert_array_equal(whole, [True, True, True])
    np.testing.assert_array_equal(part, [False, True, False])


def test_the_identity_of_a_tokenizer(trained: PreTrainedTokenizerBase) -> None:
    used = AutoTokenizer.from_pretrained(MODEL)
    used(TEXTS, truncation=True, max_length=3, padding=True)
    assert identity_of(used) == identity_of(trained) != identity_of(byte_tokenizer())


def test_whatever_changes_the_tokens_changes_the_identity() -> None:
    base = byte_tokenizer()
    another_template, another_end, trimming = byte_tokenizer(CHATML + " "), byte_tokenizer(), byte_tokenizer()
    another_end.eos_token = "<|im_end|>"
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert len({identity_of(tokenizer) for tokenizer in (base, another_template, another_end, trimming)}) == 4
