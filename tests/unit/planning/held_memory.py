"""What a step of the trainer really holds: on a CPU every tensor's storage from its making to its end, on a GPU what its allocator says."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.unit.trainer.tiny_models import byte_tokenizer, job_manifest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_api.v1alpha1 import parse_job
from finetune_trainer.data.examples import join
from finetune_trainer.data.tensors import collate
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.model import load_model
from finetune_trainer.model_files import ModelFiles
from finetune_trainer.objectives.sft import Sft
from finetune_trainer.optimisation import Gradients, adamw
from finetune_trainer.worker import Worker


class Peak(TorchDispatchMode):
    """Counts bytes of storages that are alive, beginning with those that it is given."""

    def __init__(self, there: list[torch.Tensor]) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._now = self.bytes = 0
        for tensor in there:
            self._track(tensor)

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self._track(each)
        return made


class Steps:
    """Steps of a small Llama on one micro-batch, its state and all."""

    def __init__(
        self, folder: Path, config: LlamaConfig, training: dict[str, object], method: dict[str, object], device: str = "cpu"
    ) -> None:
        LlamaForCausalLM(config).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        spec = {"maxSequenceLength": 256, "microBatchSize": 4, "globalBatchSize": 4, "compile": "never"}
        self.job = parse_job(job_manifest(method=method, training=spec | training), local=True)
        files = ModelFiles(folder, BaseModel("small", None, "float32"), "r", ("model.safetensors",))
        self.model = load_model(files, self.job, torch.device(device))
        if self.job.spec.training.gradient_checkpointing == "always":
            self.model.transformer.activation_checkpointing_enable({"use_reentrant": False})
        named = [(name, parameter) for name, parameter in self.model.module.named_parameters() if parameter.requires_grad]
        self._optimizer = adamw(named, self.job.spec.training)
        self._gradients = Gradients((parameter for _, parameter in named), torch.device(device))
        random, size = np.random.default_rng(0), 256
        rows = [(random.integers(3, 200, size).astype(np.int32), np.ones(size, bool)) for _ in range(4)]
        self._batch = collate(join(rows), [(row,) for row in range(4)], self.model.layout).to(device)

    def take(self) -> None:
        self._gradients.zero()
        (Sft().loss(self.model, self._batch).total / self._batch.labels).backward()
        self._gradients.clip(1.0, Worker())
        self._optimizer.step()

    def there(self) -> list[torch.Tensor]:
        """What a step finds: weights, gradients, moments."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        return [*self.model.module.parameters(), *self.model.module.buffers(), *(whole for whole, _ in self._gradients._buffers), *moments]

    def peak(self) -> int:
        """Bytes at most, of a step that is not the first."""
        self.take()
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.take()
            return torch.cuda.max_memory_allocated()
        with Peak(self.there()) as measured:
            self.take()
        return measured.bytes
