"""Attention over a flat row: several examples one after the other, each of which sees only itself.

Registered with transformers under one name, so that every architecture which takes its attention from there runs on flat rows unchanged.
The boundaries travel as keyword arguments through the model's forward (see `flat_arguments`). On a GPU in half precision one
variable-length kernel does the whole row; elsewhere one causal call per example, which computes no pair twice and builds no mask.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from finetune_trainer.data.tensors import Layout, MicroBatch

NAME = "finetune_flat"


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that flat rows do not have."""


def flat_arguments(batch: MicroBatch) -> dict[str, Any]:
    """The keyword arguments of the model's forward that carry a flat micro-batch's boundaries; none for a padded one."""
    if batch.layout == "padded":
        return {}
    return {"document_lengths": batch.document_lengths}
