"""Whether a passage says what a sentence says: by the words that they share. Pure.

That is a bound on invention, not a proof: a sentence of a passage's own words may still turn its meaning round. What has been invented
outright has words, and above all numbers, that the passage does not have.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_trainer.retrieval.words import Language, terms


@dataclass(frozen=True)
class Facts:
    """What of a text is looked for in another."""

    words: frozenset[str]
    """Words that say what it is about, without their endings."""
    numbers: frozenset[str]
    """Words with a digit, as they stand."""


@dataclass(frozen=True)
class Grounding:
    """How a sentence is held against passages."""

    language: Language
    least: float
    """Share of a sentence's content words that one passage must hold; 0 lets everything pass."""

    def facts(self, text: str) -> Facts:
        """What is compared of a text."""
        numbers = frozenset(word for word in terms(text) if any(character.isdigit() for character in word))
        return Facts(frozenset(self.language.content(text)), numbers)

    def holds(self, sentence: str, passages: Iterable[Facts]) -> bool:
        """Whether one of the passages supports the sentence; none supports a sentence without a content word."""
        said = self.facts(sentence)
        return self.least == 0 or any(support(said, passage) >= self.least for passage in passages)


def support(said: Facts, passage: Facts) -> float:
    """The share of what is said that a passage holds, 0 to 1; 0 where it lacks one of the numbers."""
    if not said.words or not said.numbers <= passage.numbers:
        return 0.0
    return len(said.words & passage.words) / len(said.words)
