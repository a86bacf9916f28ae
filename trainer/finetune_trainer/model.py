"""The base model: checked cheaply on the head, loaded on the workers, in the number format of the computation."""

from dataclasses import dataclass

import torch

from finetune_trainer.data.tensors import Layout


@dataclass(frozen=True)
class CausalModel:
    """A causal language model, and what is known of how to compute with it."""

    module: torch.nn.Module
    """The transformers model, or the PEFT model around it."""
    layout: Layout
    """The layout of micro-batches that it takes."""
    plain_head: bool
    """Whether its logits are a linear layer over its last hidden states and nothing else."""
    precision: torch.dtype
    """Number format of the computation: float32 or bfloat16."""


def check_model(files: "ModelFiles", job: "FineTuneJob") -> "PreTrainedTokenizerBase":
    """Check on the head, from configuration, tokenizer and file list alone, that model, method and data format fit together.

    Builds the architecture on the `meta` device. Returns the tokenizer. Raises JobError (ModelInvalid, UnsafeModelFormat, InvalidSpec).
    """
    raise NotImplementedError


def load_model(files: "ModelFiles", job: "FineTuneJob", device: torch.device) -> CausalModel:
    """The model with the job's method applied, on its device, ready to train. Deterministic by training.seed. Raises JobError."""
    raise NotImplementedError
