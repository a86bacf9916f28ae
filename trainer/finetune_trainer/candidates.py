"""The models that are measured, on a worker: loaded one at a time, spread over the workers where one does not hold them.

The next candidate with the same weights finds them loaded; another checkpoint of the job's is read into the model that is there.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from finetune_api.fields import LOCAL_RUN
from finetune_api.v1alpha1 import FineTuneJob, ModelSource
from finetune_trainer import checkpoint
from finetune_trainer.answering import Asking, Candidate
from finetune_trainer.data.prepare import loss_on
from finetune_trainer.generation import Speaker, Voice
from finetune_trainer.keeping import CHECKPOINTS
from finetune_trainer.model import CausalModel, load_tokenizer, longest_example
from finetune_trainer.model_files import ModelFiles
from finetune_trainer.placement import spread
from finetune_trainer.published import Published
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Untuned:
    """The change that adds and trains nothing."""

    freezes_base = True
    virtual_tokens = 0

    def apply(self, model: torch.nn.Module, *, seed: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> torch.nn.Module:
        """The model as it is."""
        del seed, tokenizer
        return model.requires_grad_(False)


Fetch = Callable[[ModelSource, str | None], ModelFiles]
"""Brings a model's files to this machine, of a revision where that is known."""


@dataclass
class Candidates:
    """Whom a job's workers ask. Every worker has one, and asks for the same candidates in the same order."""

    job: FineTuneJob
    revision: str
    """Of the job's base model, as the head has resolved it."""
    config: Mapping[str, Any]
    """Everything that the result follows from: what the checkpoints were made under."""
    storage: Storage
    """Where the job's checkpoints are."""
    fetch: Fetch
    worker: Worker
    output: Storage | None = None
    """output.storage, where artifacts are asked for."""
    _loaded: tuple[str, ModelFiles, CausalModel] | None = field(default=None, init=False)
    _speaker: Speaker | None = field(default=None, init=False)

    def asking(self, candidate: Candidate) -> Asking:
        """A candidate that is ready to be asked. Raises JobError (ModelInvalid, ModelNotFound, CheckpointCorrupted, ...)."""
        files, model = self._model(candidate)
        if candidate.step is not None:
            checkpoint.restore_model(model, self.storage.at(CHECKPOINTS), candidate.step, self.config, self.worker)
        if self._speaker is None:
            self._speaker = Speaker(Voice(model, load_tokenizer(files), longest_example(files)), self.worker, storage=self.storage)
        most = None if candidate.whole else self.job.spec.training.max_sequence_length
        return Asking(self._speaker, loss_on(self.job), most)

    def _model(self, candidate: Candidate) -> tuple[ModelFiles, CausalModel]:
        """The candidate's model, without a checkpoint's weights as yet."""
        kind = candidate.weights
        if self._loaded is not None and self._loaded[0] == kind:
            return self._loaded[1:]
        self._forget()
        job, revision = self.job, self.revision
        if candidate.model is not None:
            other = ModelSource.model_validate(candidate.model, context=LOCAL_RUN)  # what a local run alone may name was refused before
            job, revision = job.model_copy(update={"spec": job.spec.model_copy(update={"model": other})}), None  # type: ignore[assignment]
        files = self.fetch(job.spec.model, revision)
        if candidate.artifact is not None and self.output is not None:
            with self.output.folder(candidate.artifact) as folder:
                model = spread(files, job, self.worker, Published(folder), trains=False)
        else:
            model = spread(files, job, self.worker, None if candidate.step is not None else Untuned(), trains=False)
        self._loaded = kind, files, model
        return files, model

    def _forget(self) -> None:
        """Let go of the model before another one is loaded."""
        self._loaded = self._speaker = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
