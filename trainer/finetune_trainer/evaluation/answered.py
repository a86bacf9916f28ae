"""A suite's examples as they are asked, and what a candidate makes of them: plain values and their files. Pure but for reading and writing.

    suites/<suite>.jsonl                   a Case a line
    answers/<candidate>/<suite>.jsonl      an Answered a line, complete or not there

A candidate is what is measured: `baseline` (the untuned model, asked as the data has it), `prompt-<name>`, `model-<name>`, or `step-<n>`
(the model as it was after that step).
"""

from dataclasses import dataclass

from finetune_trainer.data.cases import Case, read, written

__all__ = ["Answered", "Case", "read", "written"]


@dataclass(frozen=True)
class Answered:
    """What a candidate made of a case."""

    id: str
    text: str = ""
    """What it said; empty where nothing was generated."""
    loss: float = 0.0
    """Sum of the losses of the reference's tokens, in nats."""
    labels: int = 0
    """Tokens of the reference; 0 where its loss was not measured."""
    correct: int = 0
    """Tokens of the reference that it found the most probable in their place."""
