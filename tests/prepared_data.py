"""A job's data, prepared as its head does it, without a storage."""

import tempfile
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem
from transformers import PreTrainedTokenizerBase

from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.data.examples import Prepared, open_prepared
from finetune_trainer.data.prepare import inputs_of, write_data
from finetune_trainer.sources import Location, Mounts


def prepare_data(job: FineTuneJob, tokenizer: PreTrainedTokenizerBase, mounts: Mounts, longest: int | None = None) -> Prepared:
    """In a folder that is gone at once; what is mapped into memory stays as long as it is used."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), job, inputs_of(job, mounts), tokenizer, longest)
        return open_prepared(Location(LocalFileSystem(), folder, f"file://{folder}"), Path(folder))
