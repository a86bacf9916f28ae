"""How good a model is: losses over the splits, and the comparison of the untuned and the tuned model."""

from finetune_trainer.evaluation.comparison import compare
from finetune_trainer.evaluation.losses import Losses, measure, metric_of

__all__ = ["Losses", "compare", "measure", "metric_of"]
