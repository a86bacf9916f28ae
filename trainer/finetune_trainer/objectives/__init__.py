"""What is minimised. An objective turns a model and a micro-batch into a sum over labelled tokens; the loop divides by their number.

- `sft`: the cross-entropy of the next token
"""

from finetune_api.v1alpha1 import Objective as ObjectiveSpec
from finetune_trainer.objectives.objective import LossSum, Objective
from finetune_trainer.objectives.sft import Sft

__all__ = ["LossSum", "Objective", "Sft", "objective_for"]


def objective_for(spec: ObjectiveSpec) -> Objective:
    """The objective that a spec asks for."""
    assert spec.sft is not None  # noqa: S101 - the spec's own rule
    return Sft()
