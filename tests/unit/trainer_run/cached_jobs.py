"""Jobs whose data is prepared into a cache, for the tests of it."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.data_cache import Entry, find_or_prepare
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage

MODEL = Path(__file__).parents[3] / "examples" / "models" / "tiny-llama"


def write(path: Path, *completions: str) -> None:
    path.write_text("".join(json.dumps({"prompt": "Which batteries?", "completion": text, "text": text}) + "\n" for text in completions))


def job(
    train: Path,
    training: dict[str, object] | None = None,
    objective: dict[str, object] | None = None,
    suites: list[dict[str, object]] | None = None,
    baseline: dict[str, object] | None = None,
    **data: object,
) -> FineTuneJob:
    spec = {
        **({} if baseline is None else {"baseline": baseline}),
        "evaluation": {"suites": suites or []},
        "model": {"source": f"file://{MODEL}"},
        "data": {"train": {"source": f"file://{train}"}} | data,
        "method": {"lora": {}},
        "objective": objective or {"sft": {}},
        "training": training or {},
        "output": {"storage": f"file://{train.parent}/out"},
    }
    metadata = {"name": "bot", "namespace": "team", "uid": "u1"}
    return parse_job({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": spec}, local=True)


def of(made: FineTuneJob, **metadata: str) -> FineTuneJob:
    """The same job under another name, or of another namespace."""
    return made.model_copy(update={"metadata": made.metadata.model_copy(update=metadata)})


def find(storage: Storage, spec: FineTuneJob, tokenizer: PreTrainedTokenizerBase, longest: int | None = None) -> Entry:
    return find_or_prepare(storage, spec, Mounts(Path("/nowhere"), local=True), tokenizer, longest)
