"""What a job's owner should know of its method and its workers before it runs: said in the status, and as an Event."""

from dataclasses import dataclass

from finetune_api.v1alpha1 import Compute
from finetune_api.v1alpha1 import Method as MethodSpec


@dataclass(frozen=True)
class Needs:
    """Examples that a method should have, and what is likely with fewer."""

    examples: int
    otherwise: str


_BY_HEART = "it is likely to learn them by heart and to forget what it knew: compare the validation loss with that of method.lora"
_FROM_CHANCE = "its embeddings begin at random and have hardly left that: method.lora needs fewer"
_LITTLE = "what it learns depends much on which examples these are: compare the gap of training and validation loss"
NEEDS: dict[str, Needs] = {
    "full": Needs(1000, _BY_HEART),
    "freeze": Needs(1000, _BY_HEART),
    "lora": Needs(100, _LITTLE),
    "adapter": Needs(100, _LITTLE),
    "ia3": Needs(50, _LITTLE),
    "prompt_tuning": Needs(1000, _FROM_CHANCE),
    "prefix_tuning": Needs(1000, _FROM_CHANCE),
    "p_tuning": Needs(1000, _FROM_CHANCE),
}
"""By method. Of examples, not of tokens, and of tasks that a model of today is asked to do; nothing follows but a sentence.

full: the smallest set on which training every weight has been shown to do well (Zhou et al. 2023, LIMA); freeze trains weights as they are,
too. lora: with 100 examples of MNLI it is ahead of all others on GPT-3, and far from what it reaches with 1,000; embeddings in front of the
text are at chance with 100, and near the others with 1,000 (Hu et al. 2021, LoRA, table 16). adapter: like lora, ahead of training every
weight below 1,000 examples (He et al. 2021, On the Effectiveness of Adapter-based Tuning). ia3: 50 examples a task, those of RAFT (Liu et
al. 2022, T-Few).
"""


def advice(method: MethodSpec, examples: int) -> tuple[str, ...]:
    """Sentences of advice, none where the method suits so many training examples."""
    names = {name: info.alias or name for name, info in MethodSpec.model_fields.items()}
    chosen = next(name for name in NEEDS if getattr(method, name) is not None)
    needs = NEEDS[chosen]
    if examples >= needs.examples:
        return ()
    return (f"method.{names[chosen]} trains on {examples:,} examples; with fewer than {needs.examples:,} {needs.otherwise}",)


def strategy_advice(compute: Compute, processes: int) -> tuple[str, ...]:
    """Sentences of advice on compute.strategy; `processes` is how many train in each worker pod, one for each GPU or one alone."""
    if compute.strategy == "fsdp" and compute.workers.max * processes == 1:
        return (
            "compute.strategy fsdp is without effect: it gives each process that trains a part of the model, and here one alone trains; "
            "raise compute.workers, ask for more GPUs in compute.resourcesPerWorker, or leave the strategy out",
        )
    return ()
