"""The small tokenizer and model, made once for each session."""

from pathlib import Path

import pytest
import torch
from tests.loading import one_at_a_time
from tiny_models import byte_tokenizer, tiny_llama_config
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_trainer.methods.method import BaseModel
from finetune_trainer.model_files import ModelFiles

one_at_a_time()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny random Llama with its tokenizer, saved as hub models are. Not to be written to."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_files(model_folder: Path) -> ModelFiles:
    return ModelFiles(model_folder, BaseModel("tests/tiny", None, "float32"), "sha256:0", ("model.safetensors",))
