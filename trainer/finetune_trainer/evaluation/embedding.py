"""How close answers are to their references in meaning: the cosine of an encoder's vectors."""

from collections.abc import Sequence

import numpy as np

from finetune_trainer.encoder import Encoder


def similarities(encoder: Encoder, references: Sequence[str], answers: Sequence[str]) -> tuple[float | None, ...]:
    """The cosine of each answer with its reference, -1 to 1; None where there is no reference, 0 where nothing was answered.

    A text that occurs more than once is embedded once. Raises JobError (ModelInvalid).
    """
    pairs = [(reference, answer) for reference, answer in zip(references, answers, strict=True)]
    asked = [(reference, answer) for reference, answer in pairs if reference.strip() and answer.strip()]
    texts = list(dict.fromkeys(text for pair in asked for text in pair))
    vectors = encoder.embed(texts)
    places = {text: place for place, text in enumerate(texts)}
    cosines = iter([float(np.clip(vectors[places[one]] @ vectors[places[other]], -1, 1)) for one, other in asked])
    return tuple((next(cosines) if answer.strip() else 0.0) if reference.strip() else None for reference, answer in pairs)
