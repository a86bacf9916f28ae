"""Tiny models with a method applied: what the tests of the methods are made of."""

import json

import torch
from tiny_models import tiny_llama_config
from transformers import LlamaForCausalLM, PreTrainedModel

from finetune_api.v1alpha1 import Method as MethodSpec
from finetune_trainer.methods import Method, method_for
from finetune_trainer.methods.method import BaseModel

INPUT = torch.tensor([[5, 6, 7, 8, 9, 10]])
BASE = BaseModel("owner/name", "c0ffee", "float32")


def tiny(**changes: object) -> PreTrainedModel:
    """The same model each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_llama_config(**changes)).eval()


def on_meta(**changes: object) -> PreTrainedModel:
    """The model as the head has it: without weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_llama_config(**changes))


def method(**spec: object) -> Method:
    """The method of a spec: method(lora={"rank": 4})."""
    return method_for(MethodSpec.model_validate_json(json.dumps(spec)))


def shake(model: torch.nn.Module, scale: float = 0.1) -> None:
    """Trained parameters as if they had been trained: most methods begin as the base model."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def trained_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def learn(model: torch.nn.Module, steps: int = 20, rate: float = 1e-2) -> tuple[float, float]:
    """Loss of one row before and after a few steps on it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=INPUT, labels=INPUT).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]
