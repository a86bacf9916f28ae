"""Frozen weights in four or eight bits, by bitsandbytes, which is an extra of this package and needs a GPU to be of use."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.errors import JobError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def quantization_config(kind: str, precision: torch.dtype) -> "BitsAndBytesConfig | None":
    """How transformers quantizes the linear layers but the output layer while it loads them; None where nothing is quantized.

    `kind` is model.quantization. nf4 (Dettmers et al. 2023) also quantizes its own constants, and computes in `precision`.
    """
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=precision
    )


def gpus_here() -> int:
    """GPUs of this machine, which is where the workers of a local run are."""
    return torch.cuda.device_count()


def check_quantization(job: FineTuneJob, gpus: int) -> None:
    """Raise JobError (InvalidSpec) before workers exist where they could not hold quantized weights. `gpus` is what a worker gets."""
    kind = job.spec.model.quantization
    if kind == "none":
        return
    if not gpus:
        raise JobError(Reason.INVALID_SPEC, f"model.quantization {kind} needs a GPU, and the workers have none")
    if find_spec("bitsandbytes") is None:
        missing = "bitsandbytes, which is not installed in the trainer's image (the extra `quantization`)"
        raise JobError(Reason.INVALID_SPEC, f"model.quantization {kind} needs {missing}")
