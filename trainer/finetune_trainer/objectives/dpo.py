"""Direct preference optimisation: of two answers the chosen one becomes more probable against the rejected one (Rafailov et al. 2023).

    reward(answer) = beta * (log p(answer) - log p_before(answer))
    margin         = reward(chosen) - reward(rejected)
    loss           = -(1 - s) * log sigmoid(margin) - s * log sigmoid(-margin)

p_before is the model that the training begins from (`references`); s is the label smoothing (conservative DPO, Mitchell 2023): the share of
the pairs that are taken to be the wrong way round. A pair is one unit, whatever the length of its answers.
"""

from dataclasses import dataclass

from torch.nn import functional

from finetune_api.objectives import DpoObjective
from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel
from finetune_trainer.objectives.log_probabilities import example_log_probabilities
from finetune_trainer.objectives.objective import LossSum, Unit
from finetune_trainer.objectives.references import References


@dataclass(frozen=True)
class Dpo:
    """The loss of pairs: the examples of a batch are chosen, rejected, chosen, rejected, and so on."""

    spec: DpoObjective
    references: References

    unit: Unit = "group"
    figures: tuple[str, ...] = ("rewardAccuracy", "rewardMargin")

    @property
    def measured(self) -> "Dpo":
        """Itself: what it learns cannot be seen in the cross-entropy of either answer."""
        return self

    def loss(self, model: CausalModel, batch: MicroBatch) -> LossSum:
        """The sum over the pairs.

        Its figures: rewardMargin, and rewardAccuracy, which counts a pair where the chosen answer has the larger reward; one with equal
        rewards, as all have before the training, counts half.
        """
        log_probabilities = example_log_probabilities(model, batch)
        before = self.references[batch.split][list(batch.indices)].to(log_probabilities.device)
        chosen, rejected = (self.spec.beta * (log_probabilities - before)).view(-1, 2).unbind(dim=1)
        margins, smoothing = chosen - rejected, self.spec.label_smoothing
        losses = -(1 - smoothing) * functional.logsigmoid(margins) - smoothing * functional.logsigmoid(-margins)
        seen = margins.detach()
        figures = {"rewardAccuracy": (0.5 * (1 + seen.sign())).sum(), "rewardMargin": seen.sum()}
        return LossSum(losses.sum().float(), len(margins), figures)
