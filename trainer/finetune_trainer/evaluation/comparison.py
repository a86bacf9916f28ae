"""The untuned model beside the tuned one. Pure."""

import math
from collections.abc import Mapping

from finetune_api.status import Evaluation, EvaluationResult
from finetune_trainer.evaluation.losses import metric_of

_LARGEST_EXPONENT = 700.0


def compare(before: Mapping[str, float], after: Mapping[str, float], *, per_token: bool = True) -> Evaluation:
    """Loss and perplexity of each split that either model was measured on, and the objective's own figures.

    `per_token` says whether the losses are means over tokens, in nats: of others there is no perplexity.
    """
    results = []
    for name in sorted(before.keys() | after.keys(), key=_place):
        old, new = before.get(name), after.get(name)
        results.append(EvaluationResult(metric=metric_of(name), value=new, baseline=old))
        if per_token and "/" not in name:
            results.append(EvaluationResult(metric=f"{name}/perplexity", value=_perplexity(new), baseline=_perplexity(old)))
    return Evaluation(results=tuple(results))


def _place(name: str) -> tuple[int, str]:
    """Validation before test, and of each the loss first."""
    split, _, figure = name.partition("/")
    return ("validation", "test").index(split), figure


def _perplexity(loss: float | None) -> float | None:
    """exp(loss), or None where that is no number that can be shown."""
    return math.exp(loss) if loss is not None and loss < _LARGEST_EXPONENT else None
