"""The README.md of a published artifact: what it is, how to use it, how it was made, how good it is. Pure."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from finetune_api.status import ArtifactKind, Evaluation, ModelSummary, Resolved
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.result import Result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = {
    "full": "full fine-tuning",
    "freeze": "fine-tuning of a part of the weights",
    "lora": "LoRA",
    "adapter": "bottleneck adapter",
    "ia3": "(IA)^3",
    "promptTuning": "prompt tuning",
    "prefixTuning": "prefix tuning",
    "pTuning": "P-tuning",
}
_RELATIONS = {"adapter": "adapter", "merged": "merge", "model": "finetune"}
"""The hub's word for what an artifact is to its base model."""

_MEANINGS = {
    "token": "Losses are means per labelled token, in nats, on examples that were not trained on.",
    "pair": "Losses are means per pair of answers, of pairs that were not trained on. A reward is beta times what an answer's "
    "log-probability has gained since before the training; the margin is the chosen answer's less the rejected one's, the accuracy the "
    "share of pairs where it is positive, one whose answers have equal rewards counting one half.",
}
"""What the measures are, by what they are means over."""


@dataclass(frozen=True)
class Publication:
    """What is to be published, and what is known of it."""

    job: FineTuneJob
    base: BaseModel
    tokenizer: "PreTrainedTokenizerBase"
    result: Result
    resolved: Resolved
    evaluation: Evaluation
    model: ModelSummary
    """Counts of its parameters; zeros where they are not known."""


def model_card(publication: Publication, kind: ArtifactKind) -> str:
    """The card of one artifact, with the metadata block that the Hugging Face hub reads."""
    job, base = publication.job, publication.base
    origin = f"[{base.name}](https://huggingface.co/{base.name})" if base.revision else f"`{base.name}`"
    return "\n".join(
        [
            "---",
            *_front_matter(publication, kind),
            "---",
            "",
            f"# {job.metadata.name}",
            "",
            _what_it_is(job, kind, origin),
            "",
            "## Evaluation",
            "",
            "| measure | base model | this model |",
            "| --- | --- | --- |",
            *(f"| {item.metric} | {_number(item.baseline)} | {_number(item.value)} |" for item in publication.evaluation.results),
            "",
            _MEANINGS["pair" if job.spec.objective.dpo else "token"],
            "",
            "## Use",
            "",
            "```python",
            *(_adapter_snippet(job, base) if kind == "adapter" else _model_snippet()),
            "```",
            "",
            *_remarks(job, kind),
            "## Training",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in _rows(publication)),
            "",
        ]
    )


def _what_it_is(job: FineTuneJob, kind: ArtifactKind, origin: str) -> str:
    name = _NAMES[job.spec.method.chosen]
    if kind == "adapter":
        return f"An adapter ({name}) for {origin}."
    if kind == "merged":
        return f"A copy of {origin} with an adapter ({name}) worked into its weights."
    return f"A fine-tuned copy of {origin} ({name})."


def _front_matter(publication: Publication, kind: ArtifactKind) -> list[str]:
    """YAML, of which JSON is a part: every value is written as JSON, so that nothing needs escaping."""
    job, base = publication.job, publication.base
    measures = [
        {"type": item.metric.rpartition("/")[2], "name": item.metric, "value": round(item.value, 6)}
        for item in publication.evaluation.results
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
        "base_model_relation": _RELATIONS[kind] if base.revision else None,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [job.spec.method.chosen, _objective(job)],
        "model-index": index if measures else None,
    }
    return [f"{name}: {json.dumps(value)}" for name, value in fields.items() if value is not None]


def _rows(publication: Publication) -> list[tuple[str, str]]:
    """How the artifact was made."""
    job, result, resolved, counts = publication.job, publication.result, publication.resolved, publication.model
    training, quantization = job.spec.training, job.spec.model.quantization
    objective = job.spec.objective
    share = counts.trained_parameters / counts.parameters if counts.parameters else None
    trained = f"{counts.trained_parameters:,} of {counts.parameters:,} ({share:.2%})" if share is not None else None
    rows = [
        ("Method", _method(job)),
        ("Trained parameters", trained),
        ("Base weights while training", quantization if quantization != "none" else None),
        ("Objective", _objective(job)),
        ("Objective's parameters", _parameters(getattr(objective, _objective(job)))),
        ("Teacher", _teacher(publication)),
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
    return [(name, value) for name, value in rows if value]


def _teacher(publication: Publication) -> str | None:
    """Whom a distilled model has learned from: the teacher's files as they were resolved, or a served model's name and its host."""
    distillation = publication.job.spec.objective.distillation
    if distillation is None:
        return None
    teacher = distillation.teacher
    if teacher.endpoint is not None:
        return _in_cell(f"`{teacher.endpoint.model}`, served by {urlsplit(teacher.endpoint.url).hostname}")
    revision = publication.result.config.get("teacher", {}).get("revision") or teacher.revision
    return _in_cell(f"`{teacher.source}`" + (f" at `{revision}`" if revision else ""))


def _in_cell(text: str) -> str:
    """The text as a table's cell holds it."""
    return text.replace("|", r"\|").replace("\n", " ")


def _method(job: FineTuneJob) -> str:
    """The method and its parameters: `LoRA, rank 8, alpha 32, ...`."""
    method = job.spec.method
    chosen = next(value for name in type(method).model_fields if (value := getattr(method, name)) is not None)
    return ", ".join(part for part in (_NAMES[method.chosen], _parameters(chosen)) if part)


def _parameters(spec: Any) -> str:  # noqa: ANN401 - any part of a spec
    """`rank 8, alpha 32, targetModules all-linear`: the fields that are set, without those that name a Secret or an address."""
    fields = spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"teacher"})
    return _in_cell(", ".join(f"{name} {_value(value)}" for name, value in fields.items()))


def _value(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _objective(job: FineTuneJob) -> str:
    objective = job.spec.objective
    return next(name for name in type(objective).model_fields if getattr(objective, name) is not None)


def _remarks(job: FineTuneJob, kind: ArtifactKind) -> list[str]:
    """What a reader has to know before the code above works."""
    if kind == "adapter" and job.spec.method.adapter is not None:
        return [
            "PEFT has no bottleneck adapters of its own. `bottleneck_adapter.py` in this folder adds them: one file that needs torch, peft",
            "and transformers alone. Import it before the adapter is loaded; read it first, as any code that you download.",
            "",
        ]
    return []


def _adapter_snippet(job: FineTuneJob, base: BaseModel) -> list[str]:
    revision = f", revision={base.revision!r}" if base.revision else ""
    is_loadable = base.revision is not None or "://" not in base.name
    name = repr(base.name) if is_loadable else '"path/to/the/base/model"'
    origin = "" if is_loadable else f"  # {base.name}"
    bottleneck = job.spec.method.adapter is not None
    return [
        *(["import sys", ""] if bottleneck else []),
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *(['sys.path.insert(0, "path/to/this/folder")', "import bottleneck_adapter", ""] if bottleneck else []),
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
