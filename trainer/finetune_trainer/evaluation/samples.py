"""Some examples of a suite with what the untuned and the tuned model answered, for people to read. Pure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from finetune_trainer.evaluation.answered import Answered, Case

SAMPLES_MAX = 3
"""Of each suite."""


@dataclass(frozen=True)
class Sample:
    """One example, and both answers; empty where there is none."""

    suite: str
    id: str
    prompt: str
    reference: str
    untuned: str
    tuned: str


def samples_of(
    suite: str, cases: Sequence[Case], untuned: Iterable[Answered], tuned: Iterable[Answered], most: int = SAMPLES_MAX
) -> tuple[Sample, ...]:
    """As many, evenly spread over those that were answered: nobody has chosen them, so they show the good and the bad alike."""
    before, after = ({answer.id: answer.text for answer in answers} for answers in (untuned, tuned))
    there = [case for case in cases if before.get(case.id) or after.get(case.id)]
    count = min(most, len(there))
    chosen = [there[place * len(there) // count] for place in range(count)]
    return tuple(Sample(suite, case.id, asked(case), case.reference, before.get(case.id, ""), after.get(case.id, "")) for case in chosen)


def asked(case: Case) -> str:
    """What a case asks, as one text."""
    if case.prompt is not None:
        return case.prompt
    return "\n\n".join(_spoken(message) for message in case.messages)


def _spoken(message: Mapping[str, object]) -> str:
    content = message.get("content")
    text = content if isinstance(content, str) else json.dumps({key: value for key, value in message.items() if key != "role"})
    return f"{message.get('role', '')}: {text}"
