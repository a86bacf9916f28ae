"""How the weights change: which parameters exist and train, what of them is saved, and what is published.

A method knows nothing of the loss and an objective nothing of the parameters, so every method works with every objective.

- `full`: every weight
- `freeze`: the last layers, or named modules
- `lora`: low-rank updates beside frozen weights
- `adapter`: bottleneck layers after attention and feed-forward
- `ia3`: vectors that rescale activations
- `promptTuning`, `prefixTuning`, `pTuning`: soft prompts
"""

from finetune_api.v1alpha1 import Method as MethodSpec
from finetune_trainer.methods.bottleneck import BottleneckAdapter
from finetune_trainer.methods.freeze import Freezing
from finetune_trainer.methods.full import FullTuning
from finetune_trainer.methods.ia3 import Ia3
from finetune_trainer.methods.lora import Lora
from finetune_trainer.methods.method import Method, ModelChange
from finetune_trainer.methods.peft_models import check_mergeable
from finetune_trainer.methods.prompts import SoftPrompt

__all__ = [
    "BottleneckAdapter",
    "Freezing",
    "FullTuning",
    "Ia3",
    "Lora",
    "Method",
    "ModelChange",
    "SoftPrompt",
    "check_mergeable",
    "method_for",
]


def method_for(spec: MethodSpec) -> Method:
    """The method that a spec asks for."""
    if spec.freeze is not None:
        return Freezing(spec.freeze)
    if spec.lora is not None:
        return Lora(spec.lora)
    if spec.adapter is not None:
        return BottleneckAdapter(spec.adapter)
    if spec.ia3 is not None:
        return Ia3(spec.ia3)
    prompt = spec.prompt_tuning or spec.prefix_tuning or spec.p_tuning
    return SoftPrompt(prompt) if prompt is not None else FullTuning()
