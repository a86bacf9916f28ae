"""spec.planOnly: what the training would take, from the data that was counted and the model without its weights."""

from finetune_api.gpus import gpu_of
from finetune_api.planning import Counted, Given, device_of, holds_teacher, plan_of, precision_of
from finetune_api.status import Plan
from finetune_trainer.attempt import Attempt, Preparation
from finetune_trainer.data.batches import rows_of
from finetune_trainer.data.examples import open_prepared
from finetune_trainer.memory import sizes_of_model
from finetune_trainer.model import model_without_weights
from finetune_trainer.model_files import ModelFiles, fetch_model

GIB = 2**30


def tell_plan(attempt: Attempt, preparation: Preparation) -> None:
    """Put the plan into the report, and keep that: another attempt says it again. No worker is asked for. Raises JobError."""
    plan = make_plan(attempt, preparation)
    words = plan_in_words(plan)
    attempt.reporter.update(plan=plan, message=words)
    attempt.console.say(words)
    attempt.keep_report("Succeeded")


def make_plan(attempt: Attempt, preparation: Preparation) -> Plan:
    """The plan of a job whose data is prepared."""
    import torch

    spec = preparation.job.spec
    files = fetch_model(spec.model, attempt.mounts, attempt.cache, weights=False, revision=preparation.resolved.model_revision)
    device = device_of(spec, gpu_of(spec.compute.node_selector))
    precision: torch.dtype = getattr(torch, precision_of(spec, device))
    module, transformer = model_without_weights(files, preparation.job, precision)
    model = sizes_of_model(module, transformer, spec.method, files.base.dtype)
    train = open_prepared(attempt.storage.location(preparation.data), attempt.cache).train
    data = Counted(int(train.lengths().sum()), len(rows_of(train, spec.training)))
    return plan_of(spec, model, Given(device, data, teacher=_teacher(attempt, preparation)))


def _teacher(attempt: Attempt, preparation: Preparation) -> int:
    """Parameters of a teacher that the workers would hold."""
    from finetune_trainer.model import parameters_of_config

    spec = preparation.job.spec
    source = spec.teacher.model_source() if spec.teacher is not None and holds_teacher(spec) else None
    if source is None:
        return 0
    files: ModelFiles = fetch_model(source, attempt.mounts, attempt.cache, weights=False)
    return parameters_of_config(files)


def plan_in_words(plan: Plan) -> str:
    """The plan in a line."""
    parts = [f"{plan.steps} steps", f"about {plan.memory_per_gpu.total / GIB:.1f} GiB per process"]
    if plan.fits is not None and plan.gpu_memory:
        parts.append(f"{'fits' if plan.fits else 'does not fit'} into {plan.gpu} ({plan.gpu_memory / GIB:.0f} GiB)")
    if plan.gpu_hours is not None:
        parts.append(f"about {plan.gpu_hours:.3g} GPU-hours")
    return "planned: " + ", ".join(parts)
