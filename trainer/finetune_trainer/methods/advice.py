"""What a job's owner should know of its method and its workers before it runs: said in the status, and as an Event."""

from dataclasses import dataclass

from finetune_api.v1alpha1 import Compute
from finetune_api.v1alpha1 import Method as MethodSpec


@dataclass(frozen=True)
class Needs:
    """Examples below which a method is warned of, and what is likely with fewer."""

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

No paper names these thresholds: they are rules of thumb of ours, put where published measurements show a difference.

full: 1,000 chosen examples were enough to make a good assistant of a large model by training every weight (Zhou et al. 2023, LIMA); the
same for freeze, which trains weights as they are, too. Fewer can do: with 100 examples of MNLI, GPT-3 with every weight trained reaches
60.2 percent. lora: 63.8 percent with the same 100, the best of all, and 85.6 with 1,000. prompt_tuning, prefix_tuning, p_tuning: 37.6
(embeddings in front of the text, where guessing gives 33.3) and 48.3 percent (in front of every layer) with 100, 75.2 and 82.5 with 1,000
(Hu et al. 2021, LoRA, table 16). adapter: as lora, by likeness; where data are few it does better than training every weight, and is less
prone to learn by heart (He et al. 2021, On the Effectiveness of Adapter-based Tuning). ia3: 50, since the tasks of RAFT, on which it was
shown to do well, have 50 examples each (Liu et al. 2022, T-Few).
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
