"""What the validation losses say: which checkpoint is the best, and whether the training should stop. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.training import EarlyStopping


@dataclass(frozen=True)
class Validations:
    """The validation losses so far, as far as decisions need them. Kept in every checkpoint, so that an interruption changes nothing."""

    step: int = 0
    """Optimiser step after which the loss was measured last; 0 before the first time."""
    best_step: int | None = None
    """Step with the lowest loss; the first of several."""
    best_loss: float | None = None
    """The lowest loss."""
    bar: float | None = None
    """The loss that the next ones have to be better than: one that is lower by too little to count leaves it where it is."""
    in_vain: int = 0
    """Measurements in a row since the loss was last better by enough to count."""

    def after(self, step: int, loss: float, rule: EarlyStopping | None) -> "Validations":
        """With one more measurement."""
        lowest = self.best_loss is None or loss < self.best_loss
        counts = self.bar is None or loss < self.bar - (rule.min_delta if rule else 0.0)
        return Validations(
            step=step,
            best_step=step if lowest else self.best_step,
            best_loss=loss if lowest else self.best_loss,
            bar=loss if counts else self.bar,
            in_vain=0 if counts else self.in_vain + 1,
        )

    def over(self, rule: EarlyStopping | None) -> bool:
        """Whether the rule says that more training is in vain."""
        return rule is not None and self.in_vain >= rule.patience

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint's manifest holds it."""
        return dict(vars(self))

    @staticmethod
    def from_json(value: Mapping[str, Any] | None) -> "Validations":
        """What `to_json` gave; nothing measured where there is nothing."""
        return Validations(**value) if value else Validations()
