"""What is minimised.

An objective turns a model and a micro-batch into a sum over labelled tokens or examples; the loop divides by their number.

- `sft`: the cross-entropy of the next token
- `distillation`: becoming like a teacher
- `dpo`: preferring one answer to another
"""

from finetune_api.v1alpha1 import Objective as ObjectiveSpec
from finetune_trainer.objectives.distillation import begin_distillation
from finetune_trainer.objectives.dpo import Dpo
from finetune_trainer.objectives.objective import Context, LossSum, Objective, figures_of, parameters_of
from finetune_trainer.objectives.references import references_of
from finetune_trainer.objectives.sft import Sft

__all__ = ["Context", "LossSum", "Objective", "Sft", "begin", "figures_of", "parameters_of"]


def begin(spec: ObjectiveSpec, context: Context) -> Objective:
    """The objective that a spec asks for. Every worker calls it at the same time, since it may have to compute something first."""
    if spec.distillation is not None:
        return begin_distillation(spec.distillation, context)
    if spec.dpo is not None:
        return Dpo(spec.dpo, references_of(context))
    assert spec.sft is not None  # noqa: S101 - the spec's own rule
    return Sft()
