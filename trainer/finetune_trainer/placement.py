"""How the model is spread over the workers: whole on each of them, or a part on each."""

import torch

from finetune_api.estimate import STATE_SHARE
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.activations import with_activations
from finetune_trainer.attention import use_flat_attention
from finetune_trainer.compiling import compile_layers
from finetune_trainer.cpu_norms import use_cpu_norms
from finetune_trainer.memory import coming_bytes, state_bytes
from finetune_trainer.methods import ModelChange, method_for
from finetune_trainer.model import CausalModel, load_model, model_without_weights, precision_for
from finetune_trainer.model_files import ModelFiles
from finetune_trainer.sharding import shard
from finetune_trainer.worker import CPU, Worker


def placed(files: ModelFiles, job: FineTuneJob, worker: Worker) -> tuple[CausalModel, tuple[str, ...]]:
    """The job's model as this worker trains it, and what the job's owner should know of that. Every worker calls it.

    Raises JobError (ModelInvalid).
    """
    return _ready(spread(files, job, worker), job, worker)


def spread(files: ModelFiles, job: FineTuneJob, worker: Worker, method: ModelChange | None = None, *, trains: bool = True) -> CausalModel:
    """The job's model with its method, or another, whole on this worker or a part of it. Every worker calls it.

    `trains` says whether room is needed for gradients and moments. Raises JobError (ModelInvalid).
    """
    method = method or method_for(job.spec.method)
    if not _is_to_be_sharded(files, job, worker, method, trains=trains):
        return load_model(files, job, worker.device, method=method)
    precision = precision_for(job.spec.training.precision, worker.device)
    # Only the one that leads ever holds all weights, in its machine's memory: the others get their part from it.
    if worker.leads:
        whole = load_model(files, job, CPU, precision=precision, method=method)
        module, transformer, flat, scale = whole.module, whole.transformer, whole.layout == "flat", whole.head_scale
    else:
        (module, transformer), flat, scale = model_without_weights(files, job, precision, method), False, None
    flat, scale = bool(worker.agree(int(flat))), worker.sum(scale or 0.0) or None
    if flat:
        use_flat_attention(transformer)
    shard(module, transformer, worker.device)
    return CausalModel(module, transformer, "flat" if flat else "padded", scale, precision, worker.device, sharded=True)


def _is_to_be_sharded(files: ModelFiles, job: FineTuneJob, worker: Worker, method: ModelChange, *, trains: bool) -> bool:
    """compute.strategy; auto is fsdp where one GPU holds not all of weights and, in training, of gradients and moments."""
    strategy, lora = job.spec.compute.strategy, job.spec.method.lora
    if strategy != "auto" or worker.world == 1:
        return strategy == "fsdp" and worker.world > 1
    if worker.device.type != "cuda" or job.spec.model.quantization != "none" or (lora is not None and lora.variant == "pissa"):
        return False
    module, _ = model_without_weights(files, job, precision_for(job.spec.training.precision, worker.device), method)
    _, total = torch.cuda.mem_get_info(worker.device)
    needed = state_bytes(module) - (0 if trains else coming_bytes(module))
    return worker.sum(float(needed > STATE_SHARE * total)) > 0


def _ready(model: CausalModel, job: FineTuneJob, worker: Worker) -> tuple[CausalModel, tuple[str, ...]]:
    """The model with its activations held as memory and training ask for, computed as it is fastest on its device."""
    model, warnings = with_activations(model, job, worker)
    if model.device.type == "cpu" and not model.sharded and job.spec.training.compile != "always":  # which fuses them itself
        use_cpu_norms(model.transformer)
    return model, (*warnings, *compile_layers(model, job.spec, worker))
