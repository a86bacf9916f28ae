"""The untuned model beside the tuned one. Pure."""

import math
from collections.abc import Mapping

from finetune_api.status import Evaluation, EvaluationResult

_LARGEST_EXPONENT = 700.0


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> Evaluation:
    """Loss and perplexity of each split that either model was measured on."""
    results = []
    for split in sorted(before.keys() | after.keys(), key=("validation", "test").index):
        old, new = before.get(split), after.get(split)
        results.append(EvaluationResult(metric=f"{split}/loss", value=new, baseline=old))
        results.append(EvaluationResult(metric=f"{split}/perplexity", value=_perplexity(new), baseline=_perplexity(old)))
    return Evaluation(results=tuple(results))


def _perplexity(loss: float | None) -> float | None:
    """exp(loss), or None where that is no number that can be shown."""
    return math.exp(loss) if loss is not None and loss < _LARGEST_EXPONENT else None
