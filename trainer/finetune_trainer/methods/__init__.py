"""How the weights change: which parameters exist and train, what of them is saved, and what is published.

A method knows nothing of the loss and an objective nothing of the parameters, so every method works with every objective.

- `lora`: low-rank updates beside frozen weights
- `full`: every weight
"""

from finetune_api.v1alpha1 import Method as MethodSpec
from finetune_trainer.methods.full import FullTuning
from finetune_trainer.methods.lora import Lora
from finetune_trainer.methods.method import Method

__all__ = ["FullTuning", "Lora", "Method", "method_for"]


def method_for(spec: MethodSpec) -> Method:
    """The method that a spec asks for."""
    if spec.lora is not None:
        return Lora(spec.lora)
    return FullTuning()
