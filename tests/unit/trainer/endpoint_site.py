"""A job whose teacher is served: its data, its storage and its Secret, in a folder."""

from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from tiny_models import job_manifest, write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer import data_cache
from finetune_trainer.data.examples import Prepared, open_prepared
from finetune_trainer.endpoint_answers import endpoint_teacher
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage

KEY = "sk-the-key-of-the-teacher"


class Site:
    """A folder with a job's data, its storage and its Secret."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, *rows: Any) -> None:
        self.folder, self.tokenizer, self.said = folder, tokenizer, list[str]()
        write_jsonl(folder / "train.jsonl", *rows)
        write_jsonl(folder / "held.jsonl", rows[0])
        (folder / "secrets" / "teacher").mkdir(parents=True)
        (folder / "secrets" / "teacher" / "token").write_text(KEY + "\n")

    @property
    def storage(self) -> Storage:
        return Storage(LocalFileSystem(), str(self.folder / "out"), f"file://{self.folder}/out")

    def job(self, url: str, response: dict[str, Any] | None = None, **fields: Any) -> FineTuneJob:
        endpoint_ = {"url": url, "model": "large", "secretRef": {"name": "teacher"}, "maxTokens": 50, **fields}
        data = {
            "train": {"source": f"file://{self.folder}/train.jsonl"},
            "validation": {"source": f"file://{self.folder}/held.jsonl"},
        }
        objective = {"distillation": {"teacher": {"endpoint": endpoint_}, "response": response or {}}}
        return parse_job(job_manifest(data=data, objective=objective), local=True)

    def prepare(self, url: str, **fields: Any) -> Prepared:
        job, mounts = self.job(url, **fields), Mounts(self.folder, local=True)
        teacher = endpoint_teacher(job, self.tokenizer, mounts, self.storage, self.said.append)
        self.entry = data_cache.find_or_prepare(self.storage, job, mounts, self.tokenizer, None, teacher)
        return open_prepared(self.storage.location(self.entry.name), self.folder / "cache")

    def texts(self, prepared: Prepared, split: str = "train") -> list[tuple[str, str]]:
        """Each example as the text that is given and the text that is learned."""
        pairs = []
        for tokens, labelled in map(prepared.splits()[split].example, range(len(prepared.splits()[split]))):
            pairs.append((self.tokenizer.decode(tokens[~labelled]), self.tokenizer.decode(tokens[labelled])))
        return pairs


PROMPTS = [{"prompt": f"{word} ", "completion": "own"} for word in ("one", "two", "one", "three")]
