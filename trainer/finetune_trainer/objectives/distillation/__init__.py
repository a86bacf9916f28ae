"""Distillation: the student becomes like a teacher, in one or more forms, each with its weight, beside the labels' cross-entropy.

- `divergences`, `response`, `head`: the distributions of the next token, without a tensor of all logits
- `feature`: hidden states and attention maps
- `relation`: relations among tokens and among examples
- `teacher_cache`: what a teacher says of the training data, kept in the storage
- `objective`: their weighted sum
"""

from finetune_trainer.objectives.distillation.objective import Distillation, begin_distillation, needs_teacher, taking_of

__all__ = ["Distillation", "begin_distillation", "needs_teacher", "taking_of"]
