"""What a job's owner should know of its method and its workers before it runs: said in the status, and as an Event."""

from finetune_api.v1alpha1 import Compute
from finetune_api.v1alpha1 import Method as MethodSpec

FULL_NEEDS_EXAMPLES = 1000
"""Examples below which training every weight is likely to learn them by heart: the smallest set on which it has been shown to do well
(Zhou et al. 2023, LIMA)."""


def advice(method: MethodSpec, examples: int) -> tuple[str, ...]:
    """Sentences of advice, none where the method suits so many training examples."""
    if method.full is not None and examples < FULL_NEEDS_EXAMPLES:
        return (
            f"method.full trains every weight on {examples:,} examples; with fewer than {FULL_NEEDS_EXAMPLES:,} it is likely to learn them "
            "by heart and to forget what it knew: compare the validation loss with that of method.lora",
        )
    return ()


def strategy_advice(compute: Compute, processes: int) -> tuple[str, ...]:
    """Sentences of advice on compute.strategy; `processes` is how many train in each worker pod, one for each GPU or one alone."""
    if compute.strategy == "fsdp" and compute.workers.max * processes == 1:
        return (
            "compute.strategy fsdp is without effect: it gives each process that trains a part of the model, and here one alone trains; "
            "raise compute.workers, ask for more GPUs in compute.resourcesPerWorker, or leave the strategy out",
        )
    return ()
