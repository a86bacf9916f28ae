"""The README.md of a published artifact: what it is, how to use it, how it was made, how good it is. Pure."""

import json
from typing import Any

from finetune_api.status import Evaluation, Resolved
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.result import Result


def model_card(job: FineTuneJob, base: BaseModel, result: Result, resolved: Resolved, evaluation: Evaluation) -> str:
    """The card, with the metadata block that the Hugging Face hub reads."""
    training = job.spec.training
    is_adapter = result.kind == "adapter"
    rows = [
        ("Method", _method(job)),
        ("Loss on", job.spec.objective.sft.loss_on if job.spec.objective.sft else ""),
        ("Epochs", f"{training.epochs}"),
        ("Optimiser steps", f"{result.steps:,}"),
        ("Tokens", f"{result.trained_tokens:,}"),
        ("Global batch size", f"{training.global_batch_size}"),
        ("Learning rate", f"{training.learning_rate:g}, {training.scheduler}, warm-up {training.warmup_ratio:g}"),
        ("Longest sequence", f"{training.max_sequence_length:,} tokens{', packed' if training.packing else ''}"),
        ("Seed", f"{training.seed}"),
        ("Base model revision", f"`{resolved.model_revision}`"),
        ("Data digest", f"`{resolved.data_digest}`"),
        ("Configuration digest", f"`{resolved.config_digest}`"),
        ("Job", f"{job.metadata.namespace}/{job.metadata.name} (`{job.metadata.uid}`)"),
    ]
    origin = f"[{base.name}](https://huggingface.co/{base.name})" if base.revision else f"`{base.name}`"
    return "\n".join(
        [
            "---",
            *_front_matter(base, result, evaluation, job),
            "---",
            "",
            f"# {job.metadata.name}",
            "",
            f"{'A LoRA adapter for' if is_adapter else 'A fine-tuned copy of'} {origin}.",
            "",
            "## Evaluation",
            "",
            "| measure | base model | this model |",
            "| --- | --- | --- |",
            *(f"| {item.metric} | {_number(item.baseline)} | {_number(item.value)} |" for item in evaluation.results),
            "",
            "Losses are means per labelled token, in nats, on examples that were not trained on.",
            "",
            "## Use",
            "",
            "```python",
            *(_adapter_snippet(base) if is_adapter else _model_snippet()),
            "```",
            "",
            "## Training",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
        ]
    )


def _front_matter(base: BaseModel, result: Result, evaluation: Evaluation, job: FineTuneJob) -> list[str]:
    """YAML, of which JSON is a part: every value is written as JSON, so that nothing needs escaping."""
    measures = [
        {"type": item.metric.rpartition("/")[2], "name": item.metric, "value": round(item.value, 6)}
        for item in evaluation.results
        if item.value is not None
    ]
    index: list[dict[str, Any]] = [
        {
            "name": job.metadata.name,
            "results": [
                {"task": {"type": "text-generation"}, "dataset": {"name": "held-out examples", "type": "private"}, "metrics": measures}
            ],
        }
    ]
    fields: dict[str, Any] = {
        "base_model": base.name if base.revision else None,
        "base_model_relation": ("adapter" if result.kind == "adapter" else "finetune") if base.revision else None,
        "library_name": "peft" if result.kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft"] if result.kind == "adapter" else ["sft"],
        "model-index": index if measures else None,
    }
    return [f"{name}: {json.dumps(value)}" for name, value in fields.items() if value is not None]


def _method(job: FineTuneJob) -> str:
    lora = job.spec.method.lora
    if lora is None:
        return "every weight"
    return f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, on {', '.join(lora.target_modules)}"


def _adapter_snippet(base: BaseModel) -> list[str]:
    revision = f", revision={base.revision!r}" if base.revision else ""
    is_loadable = base.revision is not None or "://" not in base.name
    name = repr(base.name) if is_loadable else '"path/to/the/base/model"'
    origin = "" if is_loadable else f"  # {base.name}"
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({name}{revision}){origin}",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    ]


def _model_snippet() -> list[str]:
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
